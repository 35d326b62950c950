"""What the table allows to be said: a difference counts where its 95 % interval does not hold 0.

Every method is asked for the same prompts with the same seeds, so methods are compared clip by clip: what a prompt or a
seed does to both of them is no difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from magicid.evaluation import results
from magicid.evaluation.intervals import Interval
from magicid.evaluation.names import MOTIONS
from magicid.evaluation.table import DIGITS, METHODS, NAMES, TITLES, Estimate, measured
from magicid.schema import MetricRow

METHOD_NAMES = NAMES
METRIC_NAMES = TITLES
REPORTED = (
    "face_sim", "face_detect_rate", "dynamic_magnitude", "head_motion", "temporal_flickering", "temporal_consistency",
    "clip_t", "clip_i", "action", "prompt_score",
)  # fmt: skip
EVERYBODY = "all together"  # has a space, so it is no identity's id
JUDGED = ("face_sim", "dynamic_magnitude", "head_motion", "prompt_score")
JITTER = "warp_error"  # no goal of its own: it tells whether motion may be jitter
AGAINST = {"hpo": "sft", "sft": "base"}  # what each method is compared with

Differences = dict[tuple[str, str, str], Interval]
"""(identity, method, metric) -> the method minus the one it is compared with."""


@dataclass(frozen=True)
class Cell:
    """One estimate as shown. `start`, `width` and `dot` are shares (0..1) of the metric's common axis.

    `sign` is 1 where the method is above the one it is compared with, -1 where below, 0 where that cannot be said.
    `difference` says by how much.
    """

    text: str
    interval: str
    n: int
    nulls: int
    start: float
    width: float
    dot: float
    sign: int = 0
    difference: str = ""


@dataclass(frozen=True)
class Line:
    """One row of the table; `cells` in the order of `shown`, null where nothing was measured."""

    identity_id: str
    method: str
    clips: int
    cells: list[Cell | None]


def differences(rows: Sequence[MetricRow]) -> Differences:
    """Each method of AGAINST minus its other one, over the clips of the same person, prompt and seed.

    For every identity, and for EVERYBODY over those that have every method, people drawn as wholes.
    """
    by_person: dict[str, list[MetricRow]] = {}
    for row in rows:
        by_person.setdefault(row.identity_id, []).append(row)
    found: Differences = {}
    for name, members in [(EVERYBODY, whole(rows)), *by_person.items()]:
        for method, other in AGAINST.items():
            first, second = ([row for row in members if row.method == wanted] for wanted in (method, other))
            for metric in (*REPORTED, JITTER):
                if interval := results.compare(first, second, metric):
                    found[name, method, metric] = interval
    return found


def sign(interval: Interval | None) -> int:
    """1 when the interval of a difference lies above 0, -1 when below, 0 when it holds 0 or there is none."""
    if interval is None or interval.low is None or interval.high is None:
        return 0
    return int(interval.low > 0) - int(interval.high < 0)


def shown(estimates: Sequence[Estimate]) -> list[str]:
    """The metrics of the page's tables: those of REPORTED that any clip has. The manifests have all of them."""
    return [metric for metric in measured(estimates) if metric in REPORTED]


def lines(estimates: Sequence[Estimate], found: Differences) -> list[Line]:
    """The rows of the table; `found` are the `differences` of the same rows."""
    by_key = {(e.identity_id, e.method, e.metric): e for e in estimates}
    metrics = shown(estimates)
    axes = {metric: _axis([e for e in estimates if e.metric == metric]) for metric in metrics}
    rows = []
    for identity_id, method in dict.fromkeys((e.identity_id, e.method) for e in estimates):
        cells: list[Cell | None] = []
        clips = 0
        for metric in metrics:
            estimate = by_key.get((identity_id, method, metric))
            compared = found.get((identity_id, method, metric))
            cells.append(_cell(estimate, compared, *axes[metric]) if estimate else None)
            clips = max(clips, estimate.n + estimate.nulls if estimate else 0)
        rows.append(Line(identity_id, method, clips, cells))
    return rows


def whole(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows of all identities that have every method; [] for fewer than two."""
    methods: dict[str, set[str]] = {}
    for row in rows:
        methods.setdefault(row.identity_id, set()).add(row.method)
    people = {person for person, found in methods.items() if found >= set(METHODS)}
    return [row for row in rows if row.identity_id in people] if len(people) > 1 else []


def pooled(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """`whole`, as those of one identity, EVERYBODY."""
    return [dataclasses.replace(row, identity_id=EVERYBODY) for row in whole(rows)]


def verdict(found: Differences) -> tuple[str, list[str]]:
    """One plain sentence on HPO against SFT, and one for each metric, from `differences`."""
    people = sorted({name for name, method, _ in found if method == "hpo" and name != EVERYBODY})
    if not people:
        return "HPO and SFT were not both evaluated, so nothing can be said about them.", []
    together = any(name == EVERYBODY for name, _, _ in found)
    judged = [EVERYBODY] if together else people
    metrics = [metric for metric in JUDGED if all((p, "hpo", metric) in found for p in people)]
    signs = {metric: [sign(found.get((p, "hpo", metric))) for p in judged] for metric in metrics}
    above, below = ([metric for metric in metrics if way in signs[metric]] for way in (1, -1))
    headline = _headline(above, below)
    rough = [sign(found.get((p, "hpo", JITTER))) > 0 for p in judged]
    if any(all(both) for metric in MOTIONS if metric in above for both in zip(rough, (s > 0 for s in signs[metric]))):
        headline += " Its warp error, which jitter raises, is above SFT's too: a part of the motion may be jitter."
    sentences = [
        _sentence(metric, [sign(found[p, "hpo", metric]) for p in people], found.get((EVERYBODY, "hpo", metric)))
        for metric in metrics
    ]
    return (f"Over all identities: {headline}" if together else headline), sentences


def _headline(above: list[str], below: list[str]) -> str:
    def names(metrics: list[str]) -> str:
        *before, last = (METRIC_NAMES[metric] for metric in metrics)
        return f"{', '.join(before)} and {last}" if before else last

    if not above and not below:
        return "HPO does not beat SFT: no metric's difference has a 95 % interval above 0."
    if not above:
        return (
            f"HPO does not beat SFT: it is below SFT in {names(below)} and above it in none of {len(JUDGED)} metrics."
        )
    if below:
        return f"HPO is above SFT in {names(above)}, but below it in {names(below)}."
    return f"HPO is above SFT in {names(above)}, and below it in none of {len(JUDGED)} metrics."


def _sentence(metric: str, signs: list[int], together: Interval | None) -> str:
    total, above, below = len(signs), signs.count(1), signs.count(-1)
    parts = [f"above SFT for {above}"] if above else []
    parts += [f"below SFT for {below}"] if below else []
    open_ = total - above - below
    parts += [f"not told apart from SFT for {open_}"] if open_ else []
    change = f"{_difference(metric, together)} in the mean; " if together else ""
    who = "identity" if total == 1 else "identities"
    return f"{METRIC_NAMES[metric]}: {change}HPO is {', '.join(parts)} of {total} {who}."


def _difference(metric: str, interval: Interval) -> str:
    digits = DIGITS.get(metric, 3)
    ends = f" [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]" if interval.low is not None else ""
    return f"{interval.mean:+.{digits}f}{ends}"


def _axis(estimates: Sequence[Estimate]) -> tuple[float, float]:
    values = [v for e in estimates for v in (e.mean, e.low, e.high) if v is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = (high - low) * 0.04 or 0.5
    return low - pad, high + pad


def _cell(e: Estimate, compared: Interval | None, low: float, high: float) -> Cell:
    if e.mean is None:
        return Cell("–", "no clip has it", e.n, e.nulls, 0, 0, -1)
    digits = DIGITS.get(e.metric, 3)
    has_interval = e.low is not None and e.high is not None
    interval = f"{e.low:.{digits}f} to {e.high:.{digits}f}" if has_interval else "no interval"
    first = e.low if e.low is not None else e.mean
    last = e.high if e.high is not None else e.mean
    span = high - low
    return Cell(
        text=f"{e.mean:.{digits}f}",
        interval=interval,
        n=e.n,
        nulls=e.nulls,
        start=(first - low) / span,
        width=(last - first) / span,
        dot=(e.mean - low) / span,
        sign=sign(compared),
        difference=_difference(e.metric, compared) if compared else "",
    )
