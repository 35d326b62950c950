"""Preference pairs in other readings than the paper's letter, and ideas beyond it; `magicid.selection` has the letter.

caption     a static winner is trained under the SFT caption, not under its loser's action
dominates   P_dy: the winner is better in all rewards than its loser, not only on the other front
by-motion   as `dominates`, the largest gaps in R_dy first instead of R_id
floor       P_dy: a winner resembles the person at least as much as half of V_t does
panned      P_id: a copy of the photo that moves as a whole wins, not the photo held still
reencoded   P_still: the winner is decoded and encoded again as its loser is, so that only motion differs
others      also a clip of V_t against another person's of the same prompt and seed: nothing but the person differs

One reading is of the loss and not of the pairs: with `base-reference` errors are compared with the base model's, not
with those of the SFT adapter that training starts from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from magicid import recipe, schema
from magicid.laboratory.clips import encoded_again
from magicid.laboratory.methods import BOTH, Variant
from magicid.schema import Pair, ScoredClip
from magicid.selection import DYNAMIC_PAIR, STATIC_PAIR, STILL_PAIR, dominates, select_pairs

DOMINATES, BY_MOTION, OTHERS, PANNED, REENCODED = "dominates", "by-motion", "others", "panned", "reencoded"
FLOOR, BASE_REFERENCE = "floor", "base-reference"


def make_pairs(
    variant: Variant,
    person: str,
    clips: Sequence[ScoredClip],
    foreign: Sequence[ScoredClip],
    settings: recipe.Selection,
) -> list[Pair]:
    """The pairs of one adapter.

    Args:
        clips: V_s, and its V_t, V_id, V_mov and V_still, with R_id against the person.
        foreign: V_t of the other people, of the same training seed.
    """
    kinds = (STATIC_PAIR, DYNAMIC_PAIR, STILL_PAIR) if variant.pairs == BOTH else (variant.pairs,)
    pairs = [p for p in select_pairs(person, clips, settings).pairs if p.kind in kinds]
    if REENCODED in variant.readings:
        pairs = [
            dataclasses.replace(p, winner_id=encoded_again(p.winner_id)) if p.kind == STILL_PAIR else p for p in pairs
        ]
    if PANNED in variant.readings:
        panned = [clip for clip in clips if clip.kind == schema.MOVING_CLIP]
        pairs = [_with_winner(p, panned[p.rank % len(panned)]) if p.kind == STATIC_PAIR else p for p in pairs]
    if FLOOR in variant.readings and variant.pairs != STATIC_PAIR:
        pairs = [p for p in pairs if p.kind != DYNAMIC_PAIR] + _above_floor(person, clips, settings)
    if variant.readings & {DOMINATES, BY_MOTION}:
        pairs = [p for p in pairs if p.kind != DYNAMIC_PAIR]
        if variant.pairs != STATIC_PAIR:
            pairs += _dominating(person, clips, settings, by_motion=BY_MOTION in variant.readings)
    if OTHERS in variant.readings:
        for clip in (c for c in clips if c.kind == schema.TRAINED_CLIP):
            same = [f for f in foreign if (f.prompt, f.seed) == (clip.prompt, clip.seed)]
            pairs += [_pair(person, clip, f.clip_id, "others") for f in same[:1]]
    return pairs


def _with_winner(pair: Pair, winner: ScoredClip) -> Pair:
    return dataclasses.replace(
        pair, pair_id=f"{pair.pair_id}/{winner.clip_id}", winner_id=winner.clip_id, winner_kind=winner.kind
    )


def _above_floor(person: str, clips: Sequence[ScoredClip], settings: recipe.Selection) -> list[Pair]:
    """P_dy by the gap in identity, of all clips, whose winners are no less like the person than the median of V_t."""
    likeness = {clip.clip_id: clip.identity_reward for clip in clips}
    floor = np.median(
        [c.identity_reward for c in clips if c.kind == schema.TRAINED_CLIP and c.identity_reward is not None]
    )
    every = settings.model_copy(update={"dynamic_pairs": len(clips) ** 2})
    made = [p for p in select_pairs(person, clips, every).pairs if p.kind == DYNAMIC_PAIR]
    return [p for p in made if (likeness[p.winner_id] or 0.0) >= floor][: settings.dynamic_pairs]


def _dominating(person: str, clips: Sequence[ScoredClip], settings: recipe.Selection, *, by_motion: bool) -> list[Pair]:
    sampled = [
        c
        for c in clips
        if c.kind in (schema.BASE_CLIP, schema.TRAINED_CLIP)
        and None not in (c.identity_reward, c.motion_reward, c.semantics_reward)
    ]
    rewards = np.array([[c.identity_reward, c.motion_reward, c.semantics_reward] for c in sampled], dtype=float)
    better = dominates(rewards[:, None], rewards[None, :])
    column = rewards[:, 1 if by_motion else 0]
    gap = column[:, None] - column[None, :]
    order = sorted(np.argwhere(better).tolist(), key=lambda ij: -gap[ij[0], ij[1]])[: settings.dynamic_pairs]
    return [_pair(person, sampled[i], sampled[j].clip_id, "dominates") for i, j in order]


def _pair(person: str, winner: ScoredClip, loser: str, why: str) -> Pair:
    return Pair(
        pair_id=f"{why}/{winner.clip_id}/{loser}", identity_id=person, kind=DYNAMIC_PAIR, rank=0, prompt=winner.prompt,
        text_uri="", winner_id=winner.clip_id, winner_kind=winner.kind, winner_latents_uri="", winner_rewards=[],
        loser_id=loser, loser_kind="", loser_latents_uri="", loser_rewards=[],
    )  # fmt: skip
