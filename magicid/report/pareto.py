"""The Pareto plot of one identity: every clip by R_id and R_dy, both fronts, and the chosen pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from magicid.report import svg
from magicid.schema import BASE_CLIP, STATIC_CLIP, TRAINED_CLIP, Pair, ScoredClip
from magicid.selection import lower_front, upper_front

WIDTH, HEIGHT = 760.0, 460.0
_KINDS = {BASE_CLIP: "base", TRAINED_CLIP: "trained", STATIC_CLIP: "static"}
_PAIRS = {"P_id": "pair-id", "P_dy": "pair-dy"}


@dataclass(frozen=True)
class Plot:
    """The drawing and its counts: clips by kind, on the `upper` and `lower` front, and `missing` a reward."""

    drawing: Markup
    counts: dict[str, int]


def plot(clips: Sequence[ScoredClip], pairs: Sequence[Pair]) -> Plot | None:
    """Draw it; None when no clip has both R_id and R_dy. Fronts are over complete V_s and V_t, as in the selection."""
    placed = [c for c in clips if _finite(c.identity_reward) and _finite(c.motion_reward)]
    if not placed:
        return None
    upper, lower = fronts(clips)
    x = svg.Scale.over([c.identity_reward or 0.0 for c in placed], svg.LEFT + 4, WIDTH - 16)
    y = svg.Scale.over([c.motion_reward or 0.0 for c in placed], HEIGHT - svg.BOTTOM, 20.0)
    where = {c.clip_id: (x(c.identity_reward or 0.0), y(c.motion_reward or 0.0)) for c in placed}
    size = _Sizes(placed)
    lines = [_line(pair, where) for pair in pairs if pair.winner_id in where and pair.loser_id in where]
    dots = [
        _dot(clip, where[clip.clip_id], size(clip), clip.clip_id in upper, clip.clip_id in lower) for clip in placed
    ]
    title = "Clips by identity reward and motion reward, with both Pareto fronts and the chosen pairs"
    drawing = svg.drawing(
        svg.axes(x, y, "R_id, cosine with the references →", "↑ R_dy, px per frame", height=HEIGHT),
        svg.element("g", *lines, class_="pairs"),
        svg.element("g", *dots, class_="dots"),
        title=title, class_="chart pareto", width=WIDTH, height=HEIGHT,
    )  # fmt: skip
    counts = {kind: sum(c.kind == kind for c in placed) for kind in _KINDS}
    counts |= {"upper": len(upper), "lower": len(lower), "missing": len(clips) - len(placed)}
    return Plot(drawing, counts)


def fronts(clips: Sequence[ScoredClip]) -> tuple[set[str], set[str]]:
    """Clip ids of the upper and the lower front of the sampled clips."""
    sampled = [c for c in clips if c.kind in (BASE_CLIP, TRAINED_CLIP)]
    values = [[c.identity_reward, c.motion_reward, c.semantics_reward] for c in sampled]
    rewards = np.array(values, dtype=np.float64).reshape(len(sampled), 3)
    rewards[~np.isfinite(rewards)] = np.nan
    upper = {c.clip_id for c, on in zip(sampled, upper_front(rewards)) if on}
    return upper, {c.clip_id for c, on in zip(sampled, lower_front(rewards)) if on}


def _finite(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


class _Sizes:
    """Radius of a dot by R_sem, over the range that is there; clips without it get the middle."""

    def __init__(self, clips: Sequence[ScoredClip]) -> None:
        values = [c.semantics_reward for c in clips if c.semantics_reward is not None and _finite(c.semantics_reward)]
        self.low, self.high = (min(values), max(values)) if values else (0.0, 0.0)

    def __call__(self, clip: ScoredClip) -> float:
        value = clip.semantics_reward
        if value is None or not _finite(value) or self.high <= self.low:
            return 5.0
        return 3.2 + 4.6 * (value - self.low) / (self.high - self.low)


def _line(pair: Pair, where: dict[str, tuple[float, float]]) -> Markup:
    (x1, y1), (x2, y2) = where[pair.winner_id], where[pair.loser_id]
    title = (
        f"{pair.kind} number {pair.rank + 1}: {pair.winner_id[:12]} preferred to {pair.loser_id[:12]}\n{pair.prompt}"
    )
    return svg.element(
        "line", svg.element("title", title), x1=x1, y1=y1, x2=x2, y2=y2,
        class_=_PAIRS.get(pair.kind, "pair-dy"), data_w=pair.winner_id, data_l=pair.loser_id,
    )  # fmt: skip


def _dot(clip: ScoredClip, centre: tuple[float, float], radius: float, upper: bool, lower: bool) -> Markup:
    px, py = centre
    places = [name for name, on in (("upper front", upper), ("lower front", lower)) if on]
    title = "\n".join(
        [
            f"{clip.kind} {clip.clip_id[:12]}{'  ·  ' + ' and '.join(places) if places else ''}",
            f"R_id {_number(clip.identity_reward)}   R_dy {_number(clip.motion_reward)}   "
            f"R_sem {_number(clip.semantics_reward)}",
            f"{clip.prompt}  (seed {clip.seed})",
        ]
    )
    css = f"dot {_KINDS.get(clip.kind, 'base')}{' upper' if upper else ''}{' lower' if lower else ''}"
    if clip.kind == STATIC_CLIP:
        r = radius * 1.25
        d = f"M{px:.1f} {py - r:.1f}L{px + r:.1f} {py:.1f}L{px:.1f} {py + r:.1f}L{px - r:.1f} {py:.1f}Z"
        mark = svg.element("path", svg.element("title", title), d=d)
    elif clip.kind == BASE_CLIP:
        side = radius * 1.75
        mark = svg.element(
            "rect", svg.element("title", title), x=px - side / 2, y=py - side / 2, width=side, height=side, rx=1.5
        )
    else:
        mark = svg.element("circle", svg.element("title", title), cx=px, cy=py, r=radius)
    rings = [svg.element("circle", cx=px, cy=py, r=radius + 3.4, class_=f"ring {kind}")
             for kind, on in (("upper", upper), ("lower", lower)) if on]  # fmt: skip
    return svg.element("g", *rings, mark, class_=css, data_clip_id=clip.clip_id)


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.3f}"
