"""Preference pairs from scored clips: P_id, P_dy and P_still, with a reason for everything that is left out.

Source: MagicID, hybrid pair selection. "a dominates b" means that a is better in all of R_id, R_dy and R_sem; the upper
front are the clips nobody dominates, the lower front those that dominate nobody. Decided on raw, continuous rewards.
P_still is not in the paper: a clip against its own first frame held still, so that nothing but motion differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid import recipe, schema
from magicid.errors import RewardError
from magicid.rewards.identity import identity_reward
from magicid.schema import Pair, Rejected, ScoredClip
from magicid.storage import sha256_json

STATIC_PAIR, DYNAMIC_PAIR, STILL_PAIR = "P_id", "P_dy", "P_still"
USED = {"id": schema.REWARD_NAMES[:1], "id+dy": schema.REWARD_NAMES[:2], "all": schema.REWARD_NAMES}
_CHUNK = 256  # clips compared with all others at a time: N of thousands stays within tens of MB


@dataclass(frozen=True)
class Selection:
    """The pairs of one identity, the reasons, and the fronts as clip ids.

    P_id then P_dy, each by falling gap in R_id, then P_still by falling R_dy of the winner.
    """

    pairs: list[Pair] = field(default_factory=list)
    dropped: list[Rejected] = field(default_factory=list)
    upper: list[str] = field(default_factory=list)
    lower: list[str] = field(default_factory=list)


def dominates(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether a is better than b in all rewards: (..., R) and (..., R), broadcast, to (...). Never with a NaN."""
    return np.asarray((np.asarray(a) > np.asarray(b)).all(axis=-1))


def upper_front(rewards: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows nobody dominates.

    Args:
        rewards: (N, R) float, NaN for a missing reward.

    Returns:
        bool (N,); a row with a missing reward is on neither front and dominates nobody.
    """
    dominated, _ = _dominance(_matrix(rewards))
    return _complete(rewards) & ~dominated


def lower_front(rewards: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows dominate nobody; otherwise as `upper_front`."""
    _, dominating = _dominance(_matrix(rewards))
    return _complete(rewards) & ~dominating


def _matrix(rewards: NDArray[Any]) -> NDArray[np.float64]:
    matrix = np.asarray(rewards, dtype=np.float64)
    if matrix.ndim != 2 or (len(matrix) and not matrix.shape[1]):
        raise ValueError(f"rewards must have shape (N, R), not {matrix.shape}")
    return matrix


def _complete(rewards: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(~np.isnan(_matrix(rewards)).any(axis=1))


def _dominance(rewards: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(is dominated by a row, dominates a row), each (N,); rows with NaN take no part."""
    rows = np.flatnonzero(~np.isnan(rewards).any(axis=1))
    complete = rewards[rows]
    dominated, dominating = np.zeros(len(rewards), bool), np.zeros(len(rewards), bool)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        better = np.ones((len(complete[part]), len(complete)), bool)
        for column in complete.T:  # one comparison matrix per reward needs no (N, N, R) array
            better &= column[part, None] > column[None, :]
        dominating[rows[part]] = better.any(axis=1)
        dominated[rows] |= better.any(axis=0)
    return dominated, dominating


def with_identity_reward(
    clips: Sequence[ScoredClip], references: Sequence[Sequence[float]] | NDArray[Any]
) -> list[ScoredClip]:
    """Copies of the clips with R_id against these references, from the face embeddings they carry; no model is needed.

    Args:
        clips: those without embeddings keep a null reward and its reason.
        references: unit embeddings (N, D) of one person, by the same recogniser.
    """
    people = np.asarray(references, dtype=np.float64)
    scored = []
    for clip in clips:
        reward, reason = None, clip.identity_error
        rows = [row for row in clip.embeddings or [] if row is not None]
        if rows:
            try:
                reward, reason = identity_reward(np.asarray(rows, dtype=np.float64), people), None
            except (RewardError, ValueError) as error:
                reason = str(error)
        if reward is None and not reason:
            reason = "no face was found in any frame" if clip.embeddings else "its face embeddings were not computed"
        scored.append(dataclasses.replace(clip, identity_reward=reward, identity_error=reason))
    return scored


def select_pairs(identity_id: str, scored: Sequence[ScoredClip], settings: recipe.Selection) -> Selection:
    """The preference pairs of one identity.

    P_id: winners from V_id, losers from V_s, the largest gaps R_id(winner) - R_id(loser) first, when R_dy(loser) -
    R_dy(winner) is within `motion_tolerance`. P_dy: winners from the upper front of V_s and V_t, losers from the lower
    one, the largest gaps first; where `same_prompt`, pairs of one prompt first. Gaps are above `min_identity_gap`, and
    those of P_dy above 0. A static winner takes its loser's prompt
    (or `static_prompt`); a P_dy pair is trained under its winner's. Only
    clips with all rewards that `settings.rewards` names take part, and only these decide: without the motion reward
    P_id has no tolerance, and by identity alone all clips are in one order, so that P_dy pairs any two.
    P_still: the `still_pairs` V_t clips of the largest R_dy, each against its V_still.

    Args:
        scored: the identity's clips and V_s, with `identity_reward` filled (`with_identity_reward`). Other identities'
            clips are ignored.
        settings: the recipe's section.

    Returns:
        Without pairs when none can be made; `dropped` then says why.
    """
    dropped: list[Rejected] = []
    clips = _usable(identity_id, scored, dropped)
    names = USED[settings.rewards]
    copies = {str(c.source_id): c for c in clips if c.kind == schema.STILL_CLIP}
    complete = _complete_clips([c for c in clips if c.kind in schema.REWARDED], dropped, names)
    static = [c for c in complete if c.kind == schema.STATIC_CLIP]
    sampled = [c for c in complete if c.kind in (schema.BASE_CLIP, schema.TRAINED_CLIP)]
    base = [c for c in sampled if c.kind == schema.BASE_CLIP]
    pairs = _static_pairs(identity_id, static, base, settings, dropped)

    rewards = np.array([[getattr(c, f"{name}_reward") for name in names] for c in sampled], dtype=np.float64)
    rewards = rewards.reshape(len(sampled), len(names))
    upper = [c for c, on in zip(sampled, upper_front(rewards)) if on or len(names) == 1]
    lower = [c for c, on in zip(sampled, lower_front(rewards)) if on or len(names) == 1]
    pairs += _dynamic_pairs(identity_id, upper, lower, settings, dropped)
    trained = [c for c in sampled if c.kind == schema.TRAINED_CLIP]
    pairs += _still_pairs(identity_id, trained, copies, settings, dropped)
    return Selection(pairs, dropped, [c.clip_id for c in upper], [c.clip_id for c in lower])


def _usable(identity_id: str, scored: Iterable[ScoredClip], dropped: list[Rejected]) -> list[ScoredClip]:
    """The identity's clips and the shared ones that have latents, one for each id, in the order of their ids."""
    own = {c.clip_id: c for c in scored if c.kind == schema.BASE_CLIP or c.identity_id == identity_id}
    usable = []
    for clip in (own[key] for key in sorted(own)):
        if clip.error is not None or clip.latents_uri is None:
            _drop(dropped, clip, clip.error or "it has no latents", "run again to make it")
        else:
            usable.append(clip)
    return usable


def _rewards(clip: ScoredClip) -> list[float | None]:
    return [clip.identity_reward, clip.motion_reward, clip.semantics_reward]


def _missing(clip: ScoredClip, names: Sequence[str]) -> str:
    """Why rewards are missing; empty when none is."""
    reasons = []
    for name in names:
        value = getattr(clip, f"{name}_reward")
        if value is None or not np.isfinite(value):
            reasons.append(f"no {name} reward: {getattr(clip, f'{name}_error') or 'not computed'}")
    return "; ".join(reasons)


def _complete_clips(clips: Sequence[ScoredClip], dropped: list[Rejected], names: Sequence[str]) -> list[ScoredClip]:
    complete = []
    for clip in clips:
        if problem := _missing(clip, names):
            _drop(dropped, clip, problem, "it takes no part in the selection")
        else:
            complete.append(clip)
    return complete


def _drop(dropped: list[Rejected], clip: ScoredClip, problem: str, action: str) -> None:
    dropped.append(Rejected("clip", clip.clip_id, f"{clip.kind}: {problem}", action))


def _static_pairs(
    identity_id: str,
    winners: Sequence[ScoredClip],
    losers: Sequence[ScoredClip],
    settings: recipe.Selection,
    dropped: list[Rejected],
) -> list[Pair]:
    """P_id."""
    if not winners or not losers:
        _none(dropped, identity_id, STATIC_PAIR, f"{len(winners)} complete V_id and {len(losers)} complete V_s clips")
        return []
    gap = _gaps(winners, losers)
    moves_enough = np.ones_like(gap, dtype=bool)
    if "motion" in USED[settings.rewards]:
        won, lost = (np.array([c.motion_reward for c in side], dtype=np.float64) for side in (winners, losers))
        moves_enough = lost[None, :] - won[:, None] <= settings.motion_tolerance
    wide = gap > settings.min_identity_gap
    fits = moves_enough & wide
    chosen = _ranked(gap, fits, winners, losers)[: settings.static_pairs]
    for i, winner in enumerate(winners):
        if not fits[i].any():
            why = f"every V_s clip moves more than {settings.motion_tolerance:g} px per frame more than it"
            if moves_enough[i].any():
                why = _no_gap(settings.min_identity_gap)
            _drop(dropped, winner, f"no P_id pair: {why}", "see selection.motion_tolerance and min_identity_gap")
    for kind, count in (
        ("beyond selection.motion_tolerance", int((~moves_enough).sum())),
        (_no_gap(settings.min_identity_gap), int((moves_enough & ~wide).sum())),
        ("beyond selection.static_pairs", int(fits.sum()) - len(chosen)),
    ):
        _count(dropped, identity_id, STATIC_PAIR, count, kind)
    if not fits.any():
        _none(dropped, identity_id, STATIC_PAIR, f"none of {gap.size} candidates fits")
    own = settings.static_prompt == "own"
    return [
        _pair(identity_id, STATIC_PAIR, rank, winners[i], losers[j], winners[i] if own else losers[j])
        for rank, (i, j) in enumerate(chosen)
    ]


def _dynamic_pairs(
    identity_id: str,
    upper: Sequence[ScoredClip],
    lower: Sequence[ScoredClip],
    settings: recipe.Selection,
    dropped: list[Rejected],
) -> list[Pair]:
    """P_dy."""
    if not upper or not lower:
        _none(dropped, identity_id, DYNAMIC_PAIR, "no complete V_s or V_t clip")
        return []
    gap = _gaps(upper, lower)
    least = max(0.0, settings.min_identity_gap)  # above 0: so no clip is ever paired with itself
    fits = gap > least
    ranked = _ranked(gap, fits, upper, lower)
    if settings.same_prompt:  # stable: within each kind still by gap
        ranked.sort(key=lambda pair: upper[pair[0]].prompt != lower[pair[1]].prompt)
    chosen = ranked[: settings.dynamic_pairs]
    chosen.sort(key=lambda pair: _order(gap, upper, lower, *pair))
    _count(dropped, identity_id, DYNAMIC_PAIR, int((~fits).sum()), _no_gap(least))
    _count(dropped, identity_id, DYNAMIC_PAIR, len(ranked) - len(chosen), "beyond selection.dynamic_pairs")
    if not fits.any():
        _none(dropped, identity_id, DYNAMIC_PAIR, f"none of {gap.size} pairs of the fronts fits")
    return [_pair(identity_id, DYNAMIC_PAIR, rank, upper[i], lower[j], upper[i]) for rank, (i, j) in enumerate(chosen)]


def _still_pairs(
    identity_id: str,
    trained: Sequence[ScoredClip],
    copies: Mapping[str, ScoredClip],
    settings: recipe.Selection,
    dropped: list[Rejected],
) -> list[Pair]:
    """P_still."""
    if not settings.still_pairs:
        return []
    moving = sorted((c for c in trained if c.motion_reward is not None), key=_motion_order)
    chosen = [c for c in moving if c.clip_id in copies][: settings.still_pairs]
    if not chosen:
        _none(dropped, identity_id, STILL_PAIR, f"{len(moving)} complete V_t and {len(copies)} V_still clips")
    return [_pair(identity_id, STILL_PAIR, rank, c, copies[c.clip_id], c) for rank, c in enumerate(chosen)]


def _motion_order(clip: ScoredClip) -> tuple[float, str]:
    """The most motion first; equal ones by id."""
    return -float(clip.motion_reward or 0.0), clip.clip_id


def _gaps(winners: Sequence[ScoredClip], losers: Sequence[ScoredClip]) -> NDArray[np.float64]:
    """R_id(winner) - R_id(loser), (winners, losers)."""
    first = np.array([c.identity_reward for c in winners], dtype=np.float64)
    return first[:, None] - np.array([c.identity_reward for c in losers], dtype=np.float64)[None, :]


def _no_gap(least: float) -> str:
    return f"the gap in R_id is not above {least:g}"


def _order(
    gap: NDArray[np.float64], winners: Sequence[ScoredClip], losers: Sequence[ScoredClip], i: int, j: int
) -> tuple[float, str, str]:
    return -float(gap[i, j]), winners[i].clip_id, losers[j].clip_id


def _ranked(
    gap: NDArray[np.float64], fits: NDArray[np.bool_], winners: Sequence[ScoredClip], losers: Sequence[ScoredClip]
) -> list[tuple[int, int]]:
    """Candidates (winner, loser) by falling gap; equal gaps by clip ids, whatever the order of the input."""
    candidates = [(int(i), int(j)) for i, j in np.argwhere(fits)]
    return sorted(candidates, key=lambda pair: _order(gap, winners, losers, *pair))


def _pair(identity_id: str, kind: str, rank: int, winner: ScoredClip, loser: ScoredClip, prompted: ScoredClip) -> Pair:
    """A pair trained under the prompt of the clip `prompted`; its id is a content address."""
    return Pair(
        pair_id=sha256_json(["pair", identity_id, kind, winner.clip_id, loser.clip_id, prompted.prompt])[:32],
        identity_id=identity_id,
        kind=kind,
        rank=rank,
        prompt=prompted.prompt,
        text_uri=prompted.text_uri or "",
        winner_id=winner.clip_id,
        winner_kind=winner.kind,
        winner_latents_uri=winner.latents_uri or "",
        winner_rewards=_rewards(winner),
        loser_id=loser.clip_id,
        loser_kind=loser.kind,
        loser_latents_uri=loser.latents_uri or "",
        loser_rewards=_rewards(loser),
    )


def _count(dropped: list[Rejected], identity_id: str, kind: str, count: int, problem: str) -> None:
    if count:
        dropped.append(Rejected("pair", identity_id, f"{count} {kind} candidates left out: {problem}", "nothing to do"))


def _none(dropped: list[Rejected], identity_id: str, kind: str, problem: str) -> None:
    action = "look at the reasons above, or loosen the recipe's section selection"
    dropped.append(Rejected("pair", identity_id, f"no {kind} pair: {problem}", action))
