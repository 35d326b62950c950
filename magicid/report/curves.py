"""Training curves: one small chart for each group of logged columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from magicid.report import svg
from magicid.report.reading import LogRows

LN2 = math.log(2)
SMOOTHING = 12  # log rows: about how many the thick line averages over
_ERRORS = ("policy_winner", "policy_loser", "reference_winner", "reference_loser")
_LEFT_OUT = ("step", "steps_per_second")  # the speed is given as a number


@dataclass(frozen=True)
class Group:
    """Columns in one chart. `level` draws a horizontal line with its name."""

    title: str
    columns: tuple[str, ...]
    note: str = ""
    level: tuple[float, str] | None = None
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """A drawn group: `legend` holds (CSS class of the line, name, last value)."""

    title: str
    note: str
    drawing: Markup
    legend: list[tuple[str, str, str]]


_HPO = (
    Group(
        "HPO loss", ("loss",), "ln 2 is a policy equal to its reference; below it, winners are preferred", (LN2, "ln 2")
    ),
    Group("Preference margin (inside)", ("inside",), "above 0 the pair is ranked as wanted", (0.0, "0")),
    Group(
        "Accuracy and gradient factor", ("accuracy", "gradient_factor"), "1 is all pairs ranked as wanted", None, (0, 1)
    ),
    Group("Velocity errors", _ERRORS, "solid: policy, dashed: frozen reference"),
)
_SFT = (Group("SFT loss", ("loss",), "velocity error on the inflated photos"),)


def charts(logs: Mapping[str, LogRows]) -> list[Chart]:
    """Charts of the stages' logs, known groups first; columns no group knows get a chart each."""
    drawn, others = [], []
    for stage, rows in logs.items():
        groups = _HPO if stage == "hpo" else _SFT
        known = {column for group in groups for column in group.columns}
        rest = [column for column in rows[0] if column not in known and column not in _LEFT_OUT]
        drawn += [_chart(group, rows) for group in groups]
        others += [_chart(Group(f"{stage.upper()} {c.replace('_', ' ')}", (c,)), rows) for c in rest]
    return [chart for chart in drawn + others if chart is not None]


def speed(rows: LogRows) -> str:
    """Median steps per second, in words; empty where it was not logged."""
    values = sorted(value for row in rows if (value := row.get("steps_per_second")) and math.isfinite(value))
    return f"{values[len(values) // 2]:.2g} steps per second" if values else ""


def smooth(values: Sequence[float], window: int = SMOOTHING) -> list[float]:
    """Exponential moving average without a bias to the start; NaN carries the last value on."""
    decay = 1 - 1 / max(1.0, min(window, len(values) / 5))
    total = weight = 0.0
    averaged = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        averaged.append(total / weight if weight else math.nan)
    return averaged


def _series(rows: LogRows, column: str) -> list[float]:
    return [math.nan if row.get(column) is None else float(row[column]) for row in rows]


def _chart(group: Group, rows: LogRows) -> Chart | None:
    steps = [float(row["step"]) for row in rows]
    lines = {column: _series(rows, column) for column in group.columns if any(column in row for row in rows)}
    finite = [value for values in lines.values() for value in values if math.isfinite(value)]
    if not finite:
        return None
    shown = finite + ([group.level[0]] if group.level else []) + list(group.bounds or ())
    x = svg.Scale.over(steps, svg.LEFT, svg.WIDTH - svg.RIGHT, margin=0.0)
    y = svg.Scale.over(shown, svg.HEIGHT - svg.BOTTOM, svg.TOP, margin=0.08)
    parts = [svg.axes(x, y, "step")]
    if group.level:
        height, name = y(group.level[0]), group.level[1]
        parts.append(svg.element("line", x1=x.start, x2=x.end, y1=height, y2=height, class_="level"))
        parts.append(svg.element("text", name, x=x.end - 3, y=height - 4, class_="level-name end"))
    legend = []
    for number, (column, values) in enumerate(lines.items()):
        line = f"line-{column}" if column in _ERRORS else f"line-{number}"
        parts.append(_path(steps, values, x, y, f"raw {line}"))
        parts.append(_path(steps, smooth(values), x, y, f"smooth {line}"))
        last = next((value for value in reversed(values) if math.isfinite(value)), math.nan)
        legend.append((line, column.replace("_", " "), f"{last:.4g}"))
    title = f"{group.title} over training steps"
    return Chart(group.title, group.note, svg.drawing(*parts, title=title), legend)


def _path(steps: Sequence[float], values: Sequence[float], x: svg.Scale, y: svg.Scale, css: str) -> Markup:
    points = [(x(step), y(value)) for step, value in zip(steps, values) if math.isfinite(value)]
    if len(points) == 1:
        return svg.element("circle", cx=points[0][0], cy=points[0][1], r=3, class_=css)
    return svg.element("path", d="M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points), class_=css)
