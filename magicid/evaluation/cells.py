"""Estimates as the text of a table's cells."""

from __future__ import annotations

from collections.abc import Sequence

from magicid.evaluation.intervals import Interval
from magicid.evaluation.names import method_name
from magicid.schema import MetricRow

DIGITS = {
    "face_sim": 3, "face_sim_missing0": 3, "face_detect_rate": 3, "dynamic_degree": 2, "dynamic_degree_vbench": 2,
    "dynamic_magnitude": 2, "head_motion": 2, "temporal_flickering": 4, "warp_error": 2, "temporal_consistency": 4,
    "clip_t": 2, "clip_i": 2, "action": 2, "place": 2, "prompt_score": 2,
}  # fmt: skip


def measured(rows: Sequence[MetricRow], names: Sequence[str]) -> list[str]:
    """The measures that one row at least has."""
    return [name for name in names if any(getattr(row, name) is not None for row in rows)]


def named(method: str, setting: str) -> str:
    """A method and what differs in it."""
    return method_name(method) + (f", {setting}" if setting else "")


def cell(interval: Interval | None, digits: int, clips: int | None = None) -> str:
    """A mean with its interval, and how many of `clips` lack it; a dash for none."""
    if interval is None:
        return "–"
    text = f"{interval.mean:.{digits}f}"
    if interval.low is not None and interval.high is not None:
        text += f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    missing = (clips or interval.clips) - interval.clips
    return f"{text} ({missing} null)" if missing else text


def number(value: float | None, digits: int) -> str:
    """A number; a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"
