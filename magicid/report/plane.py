"""Identity against motion: the mean of each method with its intervals, in the order in which a model is trained."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from magicid.evaluation.names import MOTIONS
from magicid.evaluation.table import METHODS, NAMES, TITLES, Estimate
from magicid.report import svg

IDENTITY = "face_sim"


def planes(estimates: Sequence[Estimate], identity_id: str) -> list[Markup]:
    """A drawing for each measure of motion; up and to the right is better. Fewer than two methods: none.

    Args:
        estimates: of any identities and measures; those of `identity_id` are drawn.
    """
    return [drawn for motion in MOTIONS if (drawn := _plane(estimates, identity_id, motion))]


def _plane(estimates: Sequence[Estimate], identity_id: str, motion: str) -> Markup | None:
    own = {(e.method, e.metric): e for e in estimates if e.identity_id == identity_id and e.mean is not None}
    points = [
        (method, own[method, IDENTITY], own[method, motion])
        for method in METHODS
        if (method, IDENTITY) in own and (method, motion) in own
    ]
    if len(points) < 2:
        return None
    x = svg.Scale.over([v for _, e, _ in points for v in _ends(e)], svg.LEFT, svg.WIDTH - svg.RIGHT)
    y = svg.Scale.over([0.0, *(v for _, _, e in points for v in _ends(e))], svg.HEIGHT - svg.BOTTOM, svg.TOP + 8)
    places = [(method, x(a.mean or 0.0), y(b.mean or 0.0), a, b) for method, a, b in points]
    way = svg.element("polyline", points=" ".join(f"{px:.1f},{py:.1f}" for _, px, py, _, _ in places), class_="way")
    marks = [_mark(method, px, py, a, b, x, y) for method, px, py, a, b in places]
    title = f"{TITLES[IDENTITY]} against {TITLES[motion]}"
    return svg.drawing(svg.axes(x, y, TITLES[IDENTITY], TITLES[motion]), way, *marks, title=title)


def _ends(e: Estimate) -> list[float]:
    return [value for value in (e.mean, e.low, e.high) if value is not None]


def _mark(method: str, px: float, py: float, a: Estimate, b: Estimate, x: svg.Scale, y: svg.Scale) -> Markup:
    parts = []
    if a.low is not None and a.high is not None:
        parts.append(svg.element("line", x1=x(a.low), x2=x(a.high), y1=py, y2=py, class_="reach"))
    if b.low is not None and b.high is not None:
        parts.append(svg.element("line", x1=px, x2=px, y1=y(b.low), y2=y(b.high), class_="reach"))
    name = NAMES[method]
    tip = f"{name}: {TITLES[a.metric]} {a.mean:.3f}, {TITLES[b.metric]} {b.mean:.2f}, {a.n} clips"
    parts.append(svg.element("circle", svg.element("title", tip), cx=px, cy=py, r=4.5))
    end = px > svg.WIDTH * 0.7
    css = "mark-name end" if end else "mark-name"
    below = method == "sft"  # where HPO is often near, and above it
    parts.append(svg.element("text", name, x=px + (-8 if end else 8), y=py + (16 if below else -7), class_=css))
    return svg.element("g", *parts, class_=f"mark m-{method}")
