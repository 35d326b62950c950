"""The results as one document: tables of every method with intervals, figures, the paper's numbers, the conditions."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid import storage
from magicid.evaluation import figures, headline, paper, results
from magicid.evaluation.intervals import LEVEL, Interval, difference, ratio
from magicid.evaluation.metrics.video import LEAST_CLIPS, frechet_distance
from magicid.evaluation.names import MOTIONS, method_name, order
from magicid.markdown import table
from magicid.schema import MetricRow

DIGITS = {
    "face_sim": 3, "face_sim_missing0": 3, "face_detect_rate": 3, "dynamic_degree": 2, "dynamic_degree_vbench": 2,
    "dynamic_magnitude": 2, "head_motion": 2, "temporal_flickering": 4, "warp_error": 2, "temporal_consistency": 4,
    "clip_t": 2, "clip_i": 2, "action": 2, "place": 2, "prompt_score": 2,
}  # fmt: skip


def write(
    rows: Sequence[MetricRow], folder: str, reference: Sequence[MetricRow] = (), threshold: float | None = None
) -> list[str]:
    """Write results.md, results.json and the figures (SVG and PNG) into a folder on any fsspec URL; returns the names.

    Args:
        rows: of all methods; figures whose rows are not there are left out.
        reference: rows whose features the Fréchet video distance is taken to; empty: the renderer's among `rows`, and
            without these no such column.
        threshold: of face_sim, above which a clip is verified as its person; None: the share is not told.
    """
    if not reference:
        truth = [row for row in results.of_usual_length(rows) if row.method == "renderer"]
        reference = [row for row in truth if row.video_features]
    drawn = figures.draw_all(rows)
    files = {f"{name}.{kind}": data for name, pictures in drawn.items() for kind, data in pictures.items()}
    files["results.json"] = (json.dumps(to_json(rows, reference), indent=1) + "\n").encode()
    files["results.md"] = to_markdown(rows, reference, list(drawn), threshold).encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return sorted(files)


def to_markdown(
    rows: Sequence[MetricRow],
    reference: Sequence[MetricRow] = (),
    drawn: Sequence[str] = (),
    threshold: float | None = None,
) -> str:
    """The document, its figures named as files beside it."""
    parts = ["# Results\n", _methods(rows, reference), _headline(rows, threshold), _minus_hpo(rows)]
    parts += [f"![{figures.TITLES[name]}]({name}.svg)\n" for name in drawn]
    if len({row.method for row in rows}) > 1:
        parts.append(_beside_paper(rows, reference))
    return "\n".join(parts)


def to_json(rows: Sequence[MetricRow], reference: Sequence[MetricRow] = ()) -> dict[str, Any]:
    """Every estimate of every (method, setting, step), and the conditions."""
    groups = results.grouped(results.of_usual_length(rows), results.BY)
    return {
        "level": LEVEL,
        "conditions": conditions(rows),
        "methods": [
            {
                **dict(zip(results.BY, group)),
                "clips": len(members),
                "fvd": fvd(members, reference),
                "measures": {name: _plain(results.estimate(members, name)) for name in results.MEASURES},
            }
            for group, members in groups.items()
        ],
    }


def fvd(rows: Sequence[MetricRow], reference: Sequence[MetricRow]) -> float | None:
    """The Fréchet video distance of rows that have features; None where there are fewer than two on a side."""
    one, other = ([row.video_features for row in side if row.video_features] for side in (rows, reference))
    if min(len(one), len(other)) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # N is in the table
        return frechet_distance(np.array(one), np.array(other))


def conditions(rows: Sequence[MetricRow]) -> dict[str, Any]:
    """What the numbers hold for."""

    def listed(name: str) -> list[Any]:
        return sorted({getattr(row, name) for row in rows if getattr(row, name) != ""})

    return {
        "people": len({row.identity_id for row in rows}),
        "prompts": len({row.prompt for row in rows}),
        "seeds": len({row.seed for row in rows}),
        "training_seeds": len({row.train_seed for row in rows}),
        "clips": len(rows),
        "nulls": sum(row.error is not None for row in rows),
        "sizes": sorted({f"{r.frames} frames of {r.width}x{r.height} at {r.fps} fps" for r in rows}),
        "base_sha256": listed("base_sha256"),
        "adapters": len(listed("adapter_sha256")),
    }


def _methods(rows: Sequence[MetricRow], reference: Sequence[MetricRow]) -> str:
    last = results.last_steps(rows)
    measures = _measured(last, results.MEASURES)
    heads = ["method", "steps", "N", *measures, *([f"fvd to {len(reference)} clips"] if reference else [])]
    lines = []
    groups = results.grouped(last, results.BY)
    for group in sorted(groups, key=lambda key: (order(key[0]), key)):
        members = groups[group]
        method, setting, step = group
        name = _named(method, setting)
        cells = [_cell(results.estimate(members, measure), len(members), DIGITS[measure]) for measure in measures]
        distance = fvd(members, reference)
        lines.append(
            [name, str(step or "–"), str(len(members)), *cells, *([_number(distance, 1)] if reference else [])]
        )
    found = conditions(last)
    sizes = "; ".join(found["sizes"])
    return (
        f"{table(heads, lines)}\n"
        f"Mean [{LEVEL:.0%} interval, hierarchical bootstrap over people, training seeds and clips] of the last step "
        f"of each method, up to that of HPO; every person counts alike. {found['people']} people, {found['prompts']} "
        f"prompts, {found['training_seeds']} training seeds; {sizes}; {found['nulls']} clips with something that could "
        f"not be measured{', in brackets how many lack it' if found['nulls'] else ''}. "
        f"{_few(list(groups.values()), reference)}Definitions: `magicid.evaluation.metrics`.\n"
    )


def _few(groups: Sequence[Sequence[MetricRow]], reference: Sequence[MetricRow]) -> str:
    """The warning of a Fréchet distance between few clips."""
    counts = [sum(row.video_features is not None for row in rows) for rows in (*groups, reference)]
    if not reference or min(counts) >= LEAST_CLIPS:
        return ""
    return f"Fréchet distances are of {min(counts)} to {max(counts)} clips: below {LEAST_CLIPS} they are too large. "


DIFFERENCES = ("face_sim", "dynamic_magnitude", "head_motion", "warp_error", "action", "prompt_score")

_HOW = (
    "Self-reconstruction at each of its steps, from the base model on, is a line in the plane of face_sim and motion. "
    "A method is compared with that line where the line has its face_sim, and where it has its motion; same people, "
    "prompts and seeds (`magicid.evaluation.headline`)."
)


def _headline(rows: Sequence[MetricRow], threshold: float | None) -> str:
    """Each method against self-reconstruction, and what is left of the base model's actions."""
    found, by_prompt = (_by_measure(headline.beyond(rows, whole)) for whole in ("identity_id", "prompt"))
    if not found:
        return ""
    last = results.grouped(results.last_steps(rows), results.BY)
    base = [row for row in results.of_usual_length(rows) if row.method == "base"]
    heads = ["method", "steps", "against the curve of", *(f"{name}, times, at its face_sim" for name in MOTIONS)]
    heads += [*(f"face_sim, more, at its {name}" for name in MOTIONS), "action, of the base's"]
    heads += [f"face_sim > {threshold:g}"] if threshold is not None else []
    lines = []
    for (method, setting, step, curve), by in found.items():
        own = last[method, setting, step]
        cells = [_plainly(results.compare(own, base, "action", ratio), 2)]
        cells += [_plainly(results.share_above(own, "face_sim", threshold), 2)] if threshold is not None else []
        lines.append([_named(method, setting), str(step), _named(*curve), *_beyond_cells(by), *cells])
        if (method, setting) == ("hpo", ""):
            again = _beyond_cells(by_prompt[method, setting, step, curve])
            lines.append(["the same, prompts drawn as wholes instead of people", "", "", *again, *([""] * len(cells))])
    return f"## Against self-reconstruction\n\n{table(heads, lines, left=3)}\n{_HOW}\n"


def _by_measure(found: Sequence[headline.Beyond]) -> dict[tuple[Any, ...], dict[str, headline.Beyond]]:
    """(method, setting, step, curve) -> measure of motion -> what was found."""
    both: dict[tuple[Any, ...], dict[str, headline.Beyond]] = {}
    for one in found:
        both.setdefault((one.method, one.setting, one.step, one.curve), {})[one.measure] = one
    return both


def _beyond_cells(by: dict[str, headline.Beyond]) -> list[str]:
    """The ratios of motion, then the differences of face_sim."""
    cells = [_plainly(by[name].motion if name in by else None, 2) for name in MOTIONS]
    return cells + [_plainly(by[name].identity if name in by else None, 3) for name in MOTIONS]


def _minus_hpo(rows: Sequence[MetricRow]) -> str:
    """Every method at its last step minus HPO, clip by clip: what is left of it when a part is taken away."""
    last = results.grouped(results.last_steps(rows), results.BY)
    hpo = next((own for (method, setting, _), own in last.items() if (method, setting) == ("hpo", "")), [])
    measures = _measured(hpo, DIFFERENCES)
    lines = []
    for group in sorted(last, key=lambda key: (order(key[0]), key)):
        cells = _minus_cells(last[group], hpo, measures) if last[group] is not hpo else []
        if cells:
            lines.append([_named(group[0], group[1]), str(group[2] or "–"), *cells])
    if not lines:
        return ""
    text = table(["method", "steps", "N", *measures], lines)
    return (
        f"## Minus HPO, clip by clip\n\n{text}\nThe same person, prompt, seed and training; N clips that both have.\n"
    )


def _minus_cells(one: Sequence[MetricRow], other: Sequence[MetricRow], measures: Sequence[str]) -> list[str]:
    """N and the differences of one method from another; empty where they share no clip."""
    found = [results.compare(other, one, name, _minus) for name in measures]
    if not any(found):
        return []
    cells = [_plainly(interval, DIGITS[name]) for name, interval in zip(measures, found)]
    return [str(max(interval.clips for interval in found if interval)), *cells]


def _minus(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The second method minus the first: the base model, where it is one, stands beside every training of the first."""
    return -difference(means)


def _beside_paper(rows: Sequence[MetricRow], reference: Sequence[MetricRow]) -> str:
    """The paper's three tables, each number of theirs with ours beside it."""
    own = {m: members for (m, s, _), members in results.grouped(results.last_steps(rows), results.BY).items() if not s}
    measures = _measured([row for members in own.values() for row in members], results.MEASURES)

    def cell(method: str, measure: str) -> str:
        if measure == paper.FVD:
            return _number(fvd(own[method], reference), 1)
        return _cell(results.estimate(own[method], measure), len(own[method]), DIGITS[measure])

    known = [*measures, *([paper.FVD] if reference else [])]
    tables = "\n".join(paper.markdown(one, own, known, cell) + _steps_of(one, own) for one in paper.TABLES)
    return (
        f"## Beside the paper\n\n{tables}\n"
        "The paper: 40 people, 40 prompts, 61 frames of HunyuanVideo; here: as under the first table. Of other worlds "
        "the order compares, not the numbers.\n"
    )


def _steps_of(table_: paper.PaperTable, own: Mapping[str, Sequence[MetricRow]]) -> str:
    """Each row of tables 2 and 3 minus the one above it; empty without two of them."""
    if not table_.steps:
        return ""
    measures = _measured([row for members in own.values() for row in members], DIFFERENCES)
    found = [(row.name, method) for row in table_.rows if (method := row.method(own))]
    lines = []
    for (above, before), (name, method) in itertools.pairwise(found):
        cells = _minus_cells(own[method], own[before], measures)
        lines += [[f"{name} minus {above}", *cells]] if cells else []
    return f"\n{table(['clip by clip', 'N', *measures], lines)}" if lines else ""


def _measured(rows: Sequence[MetricRow], names: Sequence[str]) -> list[str]:
    """The measures that one row at least has."""
    return [name for name in names if any(getattr(row, name) is not None for row in rows)]


def _named(method: str, setting: str) -> str:
    return method_name(method) + (f", {setting}" if setting else "")


def _plainly(interval: Interval | None, digits: int) -> str:
    return "–" if interval is None else _cell(interval, interval.clips, digits)


def _cell(interval: Interval | None, clips: int, digits: int) -> str:
    if interval is None:
        return "–"
    text = f"{interval.mean:.{digits}f}"
    if interval.low is not None and interval.high is not None:
        text += f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    missing = clips - interval.clips
    return f"{text} ({missing} null)" if missing else text


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else dict(vars(interval))
