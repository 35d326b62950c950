"""What the table allows to be said: a difference counts where two 95 % intervals do not touch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Cell:
    """One estimate as shown. `start`, `width` and `dot` are shares (0..1) of the metric's common axis.

    `against` maps another method to 1 (this interval lies above the other's), -1 (below) or 0 (they touch).
    """

    text: str
    interval: str
    n: int
    nulls: int
    start: float
    width: float
    dot: float
    against: dict[str, int]


@dataclass(frozen=True)
class Line:
    """One row of the table; `cells` in the order of `shown`, null where nothing was measured."""

    identity_id: str
    method: str
    clips: int
    cells: list[Cell | None]


def separated(a: Estimate | None, b: Estimate | None) -> int:
    """1 when a's interval lies wholly above b's, -1 when below, 0 when they touch or one has none."""
    if a is None or b is None or a.low is None or a.high is None or b.low is None or b.high is None:
        return 0
    return int(a.low > b.high) - int(a.high < b.low)


def shown(estimates: Sequence[Estimate]) -> list[str]:
    """The metrics of the page's tables: those of REPORTED that any clip has. The manifests have all of them."""
    return [metric for metric in measured(estimates) if metric in REPORTED]


def lines(estimates: Sequence[Estimate]) -> list[Line]:
    """The rows of the table."""
    by_key = {(e.identity_id, e.method, e.metric): e for e in estimates}
    metrics = shown(estimates)
    axes = {metric: _axis([e for e in estimates if e.metric == metric]) for metric in metrics}
    rows = []
    for identity_id, method in dict.fromkeys((e.identity_id, e.method) for e in estimates):
        cells: list[Cell | None] = []
        clips = 0
        for metric in metrics:
            estimate = by_key.get((identity_id, method, metric))
            others = {m: by_key.get((identity_id, m, metric)) for m in METHODS if m != method}
            cells.append(_cell(estimate, others, *axes[metric]) if estimate else None)
            clips = max(clips, estimate.n + estimate.nulls if estimate else 0)
        rows.append(Line(identity_id, method, clips, cells))
    return rows


def pooled(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows of all identities that have every method as those of one, EVERYBODY; [] for fewer than two."""
    methods: dict[str, set[str]] = {}
    for row in rows:
        methods.setdefault(row.identity_id, set()).add(row.method)
    people = {person for person, found in methods.items() if found >= set(METHODS)}
    if len(people) < 2:
        return []
    return [dataclasses.replace(row, identity_id=EVERYBODY) for row in rows if row.identity_id in people]


def verdict(estimates: Sequence[Estimate], together: Sequence[Estimate] = ()) -> tuple[str, list[str]]:
    """One plain sentence on HPO against SFT, and one for each metric.

    Args:
        estimates: of single identities.
        together: of all of them (`pooled`); where there are some, the first sentence is about these.
    """
    by_key = {(e.identity_id, e.method, e.metric): e for e in [*estimates, *together]}
    people = sorted(_with(estimates, "hpo") & _with(estimates, "sft"))
    if not people:
        return "HPO and SFT were not both evaluated, so nothing can be said about them.", []
    judged = people
    if _with(together, "hpo") & _with(together, "sft"):
        judged = [EVERYBODY]
    above, below, sentences = [], [], []
    for metric in JUDGED:
        if any(by_key[p, m, metric].mean is None for p in people for m in ("sft", "hpo")):
            continue
        signs = {p: separated(by_key[p, "hpo", metric], by_key[p, "sft", metric]) for p in {*people, *judged}}
        above += [metric] if any(signs[p] > 0 for p in judged) else []
        below += [metric] if any(signs[p] < 0 for p in judged) else []
        sentences.append(_sentence(metric, [signs[p] for p in people]))
    headline = _headline(above, below)
    return (f"Over all identities: {headline}" if judged == [EVERYBODY] else headline), sentences


def _with(estimates: Sequence[Estimate], method: str) -> set[str]:
    return {e.identity_id for e in estimates if e.method == method}


def _headline(above: list[str], below: list[str]) -> str:
    def names(metrics: list[str]) -> str:
        return " and ".join(METRIC_NAMES[metric] for metric in metrics)

    if not above and not below:
        return "HPO does not beat SFT, for no 95 % interval of HPO lies above SFT's in any metric."
    if not above:
        return f"HPO does not beat SFT: it is below SFT in {names(below)} and above it in no metric."
    if below:
        return f"HPO is above SFT in {names(above)}, but below it in {names(below)}."
    return f"HPO is above SFT in {names(above)}, and below it in no metric."


def _sentence(metric: str, signs: list[int]) -> str:
    total, above, below = len(signs), signs.count(1), signs.count(-1)
    parts = [f"above SFT for {above}"] if above else []
    parts += [f"below SFT for {below}"] if below else []
    open_ = total - above - below
    parts += [f"not told apart from SFT for {open_}"] if open_ else []
    return f"{METRIC_NAMES[metric]}: HPO is {', '.join(parts)} of {total} {'identity' if total == 1 else 'identities'}."


def _axis(estimates: Sequence[Estimate]) -> tuple[float, float]:
    values = [v for e in estimates for v in (e.mean, e.low, e.high) if v is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = (high - low) * 0.04 or 0.5
    return low - pad, high + pad


def _cell(e: Estimate, others: dict[str, Estimate | None], low: float, high: float) -> Cell:
    if e.mean is None:
        return Cell("–", "no clip has it", e.n, e.nulls, 0, 0, -1, {})
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
        against={method: separated(e, other) for method, other in others.items() if other is not None},
    )
