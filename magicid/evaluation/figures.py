"""The figures, each from rows alone: mean and 95 % interval over people, training seeds and clips at every point.

- `face_sim_by_frames`: the paper's figure 2a
- `motion_by_step`: the paper's figure 2b, by both measures of motion
- `identity_against_motion_*`: each method as a curve over its training steps; up and to the right is better
- `settings_*`: held-out measures against one setting, such as beta or the learning rate
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

from magicid.evaluation import results
from magicid.evaluation.headline import RECONSTRUCTION
from magicid.evaluation.intervals import Interval
from magicid.evaluation.names import MEASURES, MOTIONS, method_name, order
from magicid.schema import MetricRow

SETTING_MEASURES = ("face_sim", "dynamic_magnitude", "head_motion", "action")
SETTINGS = ("hpo.beta", "hpo.learning_rate", "sft.learning_rate")
TITLES = {
    "face_sim_by_frames": "Identity against the number of frames",
    "motion_by_step": "Motion against training steps",
    "identity_against_motion_dynamic_magnitude": "Identity against motion by optical flow",
    "identity_against_motion_head_motion": "Identity against motion of the head",
    "settings_hpo_beta": "Held-out measures against beta",
    "settings_hpo_learning_rate": "Held-out measures against the learning rate of HPO",
    "settings_sft_learning_rate": "Held-out measures against the learning rate of SFT",
}
_COLOURS = (
    "#6b7280",
    "#d97706",
    "#059669",
    "#7c3aed",
    "#2563eb",
    "#db2777",
    "#0891b2",
    "#65a30d",
    "#dc2626",
    "#111827",
    "#92400e",
    "#f472b6",
    "#a3e635",
    "#1e3a8a",
    "#c084fc",
    "#14b8a6",
    "#78716c",
)
_STYLE = {
    "svg.hashsalt": "magicid", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip

Pictures = dict[str, bytes]
Point = tuple[Any, Interval, Interval]


def draw_all(rows: Sequence[MetricRow]) -> dict[str, Pictures]:
    """Every figure whose rows are there: name -> {"svg": bytes, "png": bytes}."""
    every_length = [row for row in rows if row.frames and not row.setting]
    rows = results.of_usual_length(rows)
    plain = [row for row in rows if not row.setting]
    drawn: dict[str, Pictures] = {}
    for motion in MOTIONS:
        if _several(plain, "step") and any(getattr(row, motion) is not None for row in plain):
            drawn[f"identity_against_motion_{motion}"] = identity_against_motion(plain, motion)
    if _several(every_length, "frames"):
        drawn["face_sim_by_frames"] = face_sim_by_frames(every_length)
    if _several(plain, "step"):
        drawn["motion_by_step"] = motion_by_step(plain)
    for key in SETTINGS:
        if setting_lines(results.last_steps(rows), key):
            drawn[f"settings_{key.replace('.', '_')}"] = by_setting(rows, key)
    return drawn


def identity_against_motion(rows: Sequence[MetricRow], motion: str = "dynamic_magnitude") -> Pictures:
    """face_sim (x) against motion (y), every method a curve over its steps; see `curve`."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for method, colour in _methods(rows):
            points = curve(rows, method, motion)
            _curve(axes, points, method_name(method), colour)
        axes.set_xlabel(MEASURES["face_sim"])
        axes.set_ylabel(MEASURES[motion])
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper")

    return _pictures(draw, (7.6, 4.4))


def curve(rows: Sequence[MetricRow], method: str, motion: str) -> list[Point]:
    """(step, face_sim, motion) of a method by rising step."""
    points = []
    for (step,), members in sorted(results.grouped(_from_base(rows, method), ["step"]).items()):
        x, y = results.estimate(members, "face_sim"), results.estimate(members, motion)
        if x and y:
            points.append((step, x, y))
    return points


def _from_base(rows: Sequence[MetricRow], method: str) -> list[MetricRow]:
    """The rows of a method. Self-reconstruction begins at the base model, which is its step 0; preferences begin at an
    adapter, and are drawn from where they are measured."""
    kept = {method, "base"} if method in RECONSTRUCTION else {method}
    return [row for row in rows if row.method in kept]


def face_sim_by_frames(rows: Sequence[MetricRow]) -> Pictures:
    """face_sim of each method against the length of its clips, of prompts and trainings with every length."""
    kept, rows = [], [row for row in rows if row.frames]  # a clip that could not be read has none
    for own in results.grouped(rows, ["method"]).values():
        lengths = results.grouped(own, ["frames"])
        if len(lengths) == 1:
            continue
        step = min(max(row.step for row in part) for part in lengths.values())
        asked = [{_asked(row) for row in part if row.step == step} for part in lengths.values()]
        shared = set.intersection(*asked)
        kept += [row for row in own if row.step == step and _asked(row) in shared]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _lines(axes, kept, "frames", "face_sim", "frames", _methods(rows))
        axes.set_xticks(sorted({row.frames for row in kept}))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")

    return _pictures(draw, (6.4, 3.4))


def _asked(row: MetricRow) -> tuple[str, int, int]:
    return row.prompt, row.seed, row.train_seed


def motion_by_step(rows: Sequence[MetricRow]) -> Pictures:
    """Both measures of motion of each method against training steps."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(MOTIONS))
        for axes, motion in zip(panels, MOTIONS):
            _lines(axes, rows, "step", motion, "training steps", _methods(rows))
            axes.set_ylim(bottom=0)
        named = [axes.get_legend_handles_labels() for axes in panels]
        handles = {label: handle for both in named for handle, label in zip(*both)}  # a panel may lack a method
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")

    return _pictures(draw, (10.4, 3.4))


def by_setting(rows: Sequence[MetricRow], key: str) -> Pictures:
    """Held-out measures of the last step against one setting, on a logarithmic axis.

    A line joins what differs in that setting and in nothing else; what has one value of it alone is left out.
    """
    lines = setting_lines(results.last_steps(rows), key)
    names = _differences([rest for _, rest in lines])

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(SETTING_MEASURES))
        for axes, measure in zip(panels, SETTING_MEASURES):
            for number, ((method, _), own) in enumerate(lines.items()):
                points = [(value, found) for value, part in own if (found := results.estimate(part, measure))]
                name = method_name(method) + (f": {names[number]}" if names[number] else "")
                _bars(axes, points, name, _COLOURS[(number + 1) % len(_COLOURS)])
            ticks = sorted({value for own in lines.values() for value, _ in own})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
            axes.minorticks_off()
            axes.set_xlabel(key)
            axes.set_ylabel(MEASURES[measure])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", fontsize=7)

    return _pictures(draw, (12.0, 3.2 + 0.14 * len(lines)))


Line = tuple[str, tuple[str, ...]]
"""A method, and the parts of its setting that all points of a line have."""


def setting_lines(rows: Sequence[MetricRow], key: str) -> dict[Line, list[tuple[float, list[MetricRow]]]]:
    """Rows that differ in nothing but a setting: method and the rest of it -> (value, rows) by rising value."""
    found: dict[Line, dict[float, list[MetricRow]]] = {}
    for row in rows:
        value = setting_value(row.setting, key)
        if value is not None:
            parts = [part.strip() for part in row.setting.split(",")]
            rest = tuple(part for part in parts if setting_value(part, key) is None)
            found.setdefault((row.method, rest), {}).setdefault(value, []).append(row)
    return {line: sorted(values.items()) for line, values in found.items() if len(values) > 1}


def _differences(settings: Sequence[tuple[str, ...]]) -> list[str]:
    """Each setting without the parts that all of them have."""
    shared = set(settings[0]).intersection(*settings) if settings else set()
    return [", ".join(part for part in parts if part not in shared) for parts in settings]


def setting_value(setting: str, key: str) -> float | None:
    """The number that a setting `key=value, ...` gives a key, section and all; None where it does not."""
    for part in setting.split(","):
        name, equals, text = part.strip().partition("=")
        if equals and name == key:
            try:
                return float(text)
            except ValueError:
                return None
    return None


def _lines(
    axes: Any, rows: Sequence[MetricRow], field: str, measure: str, label: str, methods: Sequence[tuple[str, str]]
) -> None:
    for method, colour in methods:
        own = [row for row in rows if row.method == method]
        if field == "step":
            if all(row.step == 0 for row in own):  # the base model and the renderer have no steps
                continue
            own = _from_base(rows, method)
        groups = sorted(results.grouped(own, [field]).items())
        points = [(key[0], found) for key, members in groups if (found := results.estimate(members, measure))]
        _bars(axes, points, method_name(method), colour)
    axes.set_xlabel(label)
    axes.set_ylabel(MEASURES[measure])


def _bars(axes: Any, points: Sequence[tuple[float, Interval]], name: str, colour: str) -> None:
    if not points:
        return
    x, y = [value for value, _ in points], [interval.mean for _, interval in points]
    axes.errorbar(
        x, y, yerr=_reach([interval for _, interval in points]), label=name, color=colour, marker="o", markersize=3.5,
        linewidth=1.4, elinewidth=0.9, capsize=2,
    )  # fmt: skip


def _curve(axes: Any, points: Sequence[Point], name: str, colour: str) -> None:
    if not points:
        return
    x, y = [p[1] for p in points], [p[2] for p in points]
    axes.errorbar(
        [i.mean for i in x], [i.mean for i in y], xerr=_reach(x), yerr=_reach(y), label=name, color=colour,
        marker="o" if points[-1][0] else "s", markersize=3.5, linewidth=1.4, elinewidth=0.8, capsize=1.5,
    )  # fmt: skip
    if len(points) > 1:
        axes.annotate(
            f"{points[-1][0]}", (x[-1].mean, y[-1].mean), textcoords="offset points", xytext=(4, 4), fontsize=7
        )


def _reach(intervals: Sequence[Interval]) -> list[list[float]]:
    """Lengths of the bars below and above the means; 0 where there is no interval."""
    low = [max(0.0, i.mean - i.low) if i.low is not None else 0.0 for i in intervals]
    high = [max(0.0, i.high - i.mean) if i.high is not None else 0.0 for i in intervals]
    return [low, high]


def _methods(rows: Sequence[MetricRow]) -> list[tuple[str, str]]:
    """(method, colour) in the order of the tables; a method has the same colour in every figure of the same rows."""
    found = sorted({row.method for row in rows}, key=lambda method: (order(method), method))
    return [(method, _COLOURS[number % len(_COLOURS)]) for number, method in enumerate(found)]


def _several(rows: Sequence[MetricRow], field: str) -> bool:
    """Whether one method has rows of more than one value."""
    values: dict[str, set[Any]] = {}
    for row in rows:
        values.setdefault(row.method, set()).add(getattr(row, field))
    return any(len(found) > 1 for found in values.values())


def _pictures(draw: Callable[[Any], None], size: tuple[float, float]) -> Pictures:
    """The figure as SVG and PNG; equal rows give equal bytes. Nothing is shown, and no state of matplotlib is kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        draw(figure)
        pictures = {}
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=150, metadata=metadata)
            pictures[kind] = data.getvalue()
    return pictures
