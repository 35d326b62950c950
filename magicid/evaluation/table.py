"""The table: for each identity and method, each metric's mean with a bootstrap interval and N, nulls counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import rich.table
from rich.text import Text

from magicid.evaluation.intervals import LEVEL, bootstrap
from magicid.evaluation.names import MEASURES as MEASURE_NAMES
from magicid.evaluation.names import METHODS as METHOD_NAMES
from magicid.evaluation.results import MEASURES
from magicid.markdown import table as markdown_table
from magicid.schema import MetricRow

METRICS = MEASURES
SHOWN = ("face_sim", "dynamic_magnitude", "prompt_score")  # in a terminal
METHODS = ("base", "sft", "hpo")
NAMES = {name: METHOD_NAMES[name] for name in METHODS}
DIGITS = {"dynamic_magnitude": 2, "head_motion": 2, "warp_error": 2, "clip_t": 2, "clip_i": 2}  # others: 3
TITLES = {**MEASURE_NAMES, "dynamic_magnitude": "dynamic_magnitude", "head_motion": "head motion"}


@dataclass(frozen=True)
class Estimate:
    """One metric of one method for one identity.

    `mean` is null when no clip has the metric; `low` and `high`, the ends of the 95 % interval, also when only one has.
    """

    identity_id: str
    method: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    n: int  # clips that have the metric
    nulls: int  # clips that do not


def table(rows: Sequence[MetricRow], *, seed: int = 0) -> list[Estimate]:
    """Estimates of every (identity, method) that has rows, each of METRICS: identities by name, base before sft before
    hpo before others. Non-finite values count as nulls."""
    groups: dict[tuple[str, str], list[MetricRow]] = {}
    for row in rows:
        groups.setdefault((row.identity_id, row.method), []).append(row)
    estimates = []
    for identity_id, method in sorted(groups, key=lambda key: (key[0], _place(key[1]), key[1])):
        # Parts of a run are read in no particular order; the seeded interval must not depend on it.
        members = sorted(groups[identity_id, method], key=lambda row: row.clip_id)
        for metric in METRICS:
            values = [getattr(row, metric) for row in members]
            measured = [value for value in values if value is not None and np.isfinite(value)]
            mean, low, high = bootstrap(measured, seed=seed)
            estimates.append(
                Estimate(identity_id, method, metric, mean, low, high, len(measured), len(values) - len(measured))
            )
    return estimates


def summary(rows: Sequence[MetricRow], identity_id: str, method: str) -> dict[str, float]:
    """One identity and method for a manifest: `<metric>` its mean, `<metric>_low`, `<metric>_high`, `<metric>_n`.

    What is null is left out; empty without rows.
    """
    own = [row for row in rows if row.identity_id == identity_id and row.method == method]
    values: dict[str, float | None] = {}
    for e in table(own):
        values |= {e.metric: e.mean, f"{e.metric}_low": e.low, f"{e.metric}_high": e.high, f"{e.metric}_n": float(e.n)}
    return {name: value for name, value in values.items() if value is not None}


def render(estimates: Sequence[Estimate]) -> rich.table.Table:
    """The table for a terminal of 80 columns: the three metrics that the rewards stand for."""
    drawn = rich.table.Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=f"mean [{LEVEL:.0%} bootstrap interval over N clips]",
        caption_justify="left",
    )
    drawn.add_column("identity")
    drawn.add_column("method")
    drawn.add_column("N", justify="right")
    for metric in SHOWN:
        drawn.add_column(TITLES[metric], justify="right")
    previous = None
    kept = [e for e in estimates if e.metric in SHOWN]
    for identity_id, method, clips, cells in _lines(kept, SHOWN, digits=2):
        if previous not in (None, identity_id):
            drawn.add_row()
        shown = identity_id if identity_id != previous else ""
        drawn.add_row(*(Text(value) for value in (shown, NAMES.get(method, method), clips, *cells)))
        previous = identity_id
    return drawn


def measured(estimates: Sequence[Estimate]) -> tuple[str, ...]:
    """The metrics that any clip has, in their order; face_sim always."""
    there = {e.metric for e in estimates if e.mean is not None} | {"face_sim"}
    return tuple(metric for metric in METRICS if metric in there)


def markdown(estimates: Sequence[Estimate]) -> str:
    """The table as Markdown, ending with a new line; metrics that no clip has are left out."""
    metrics = measured(estimates)
    heads = ["identity", "method", "N", *(TITLES[metric] for metric in metrics)]
    rows = [[identity_id, method, clips, *cells] for identity_id, method, clips, cells in _lines(estimates, metrics)]
    return markdown_table(heads, rows, left=2)


def _place(method: str) -> int:
    return METHODS.index(method) if method in METHODS else len(METHODS)


def _lines(
    estimates: Sequence[Estimate], metrics: Sequence[str], digits: int | None = None
) -> list[tuple[str, str, str, list[str]]]:
    """(identity, method, N, cells in the order of `metrics`)."""
    groups: dict[tuple[str, str], dict[str, Estimate]] = {}
    for estimate in estimates:
        groups.setdefault((estimate.identity_id, estimate.method), {})[estimate.metric] = estimate
    lines = []
    for (identity_id, method), by_metric in groups.items():
        clips = max(e.n + e.nulls for e in by_metric.values())
        cells = [_cell(by_metric[metric], digits) if metric in by_metric else "–" for metric in metrics]
        lines.append((identity_id, method, str(clips), cells))
    return lines


def _cell(estimate: Estimate, digits: int | None = None) -> str:
    nulls = f" ({estimate.nulls} null)" if estimate.nulls else ""
    if estimate.mean is None:
        return f"–{nulls}"
    digits = digits or DIGITS.get(estimate.metric, 3)
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return f"{estimate.mean:.{digits}f}{interval}{nulls}"
