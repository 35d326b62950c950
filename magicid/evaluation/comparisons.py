"""The parts of the results that compare: with self-reconstruction, with HPO clip by clip, with the paper's tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid.evaluation import headline, paper, results
from magicid.evaluation.cells import DIGITS, cell, measured, named, number
from magicid.evaluation.intervals import difference, ratio
from magicid.evaluation.names import MOTIONS, method_name, order
from magicid.markdown import table
from magicid.schema import MetricRow

DIFFERENCES = ("face_sim", "dynamic_magnitude", "head_motion", "warp_error", "action", "prompt_score")

_HOW = (
    "Self-reconstruction at each of its steps, from the base model on, is a line in the plane of face_sim and motion. "
    "A method is compared with that line where the line has its face_sim, and where it has its motion; same people, "
    "prompts and seeds (`magicid.evaluation.headline`). *: the line has it nowhere, and its nearest end counts. N: "
    "clips, and of how many trainings, that the method and every point of the line have."
)


def against_reconstruction(rows: Sequence[MetricRow], threshold: float | None) -> str:
    """Each method against self-reconstruction, and what is left of the base model's actions."""
    found = _by_measure(headline.beyond(rows))
    if not found:
        return ""
    usual, curves = results.of_usual_length(rows), ("base", *headline.RECONSTRUCTION)
    hpo = [row for row in usual if row.method in curves or (row.method, row.setting) == ("hpo", "")]
    by_prompt = _by_measure(headline.beyond(hpo, "prompt"))
    last = results.grouped(results.last_steps(rows), results.BY)
    base = [row for row in usual if row.method == "base"]
    heads = ["method", "steps", "against the curve of", "N", *(f"{name}, times, at its face_sim" for name in MOTIONS)]
    heads += [*(f"face_sim, more, at its {name}" for name in MOTIONS), "action, of the base's"]
    heads += [f"face_sim > {threshold:g}"] if threshold is not None else []
    lines = []
    for (method, setting, step, curve), by in found.items():
        own = last[method, setting, step]
        cells = [cell(results.compare(own, base, "action", ratio), 2)]
        cells += [cell(results.share_above(own, "face_sim", threshold), 2)] if threshold is not None else []
        lines.append([named(method, setting), str(step), named(*curve), _beyond_count(by), *_beyond_cells(by), *cells])
        if (method, setting) == ("hpo", ""):
            again = _beyond_cells(by_prompt[method, setting, step, curve])
            lines.append(
                ["the same, prompts drawn as wholes instead of people", "", "", "", *again, *([""] * len(cells))]
            )
    return f"## Against self-reconstruction\n\n{table(heads, lines, left=3)}\n{_HOW}\n"


def _by_measure(found: Sequence[headline.Beyond]) -> dict[tuple[Any, ...], dict[str, headline.Beyond]]:
    """(method, setting, step, curve) -> measure of motion -> what was found."""
    both: dict[tuple[Any, ...], dict[str, headline.Beyond]] = {}
    for one in found:
        both.setdefault((one.method, one.setting, one.step, one.curve), {})[one.measure] = one
    return both


def _beyond_count(by: dict[str, headline.Beyond]) -> str:
    clips = max(one.motion.clips for one in by.values())
    trainings = max(one.motion.seeds for one in by.values())
    return f"{clips} of {trainings}"


def _beyond_cells(by: dict[str, headline.Beyond]) -> list[str]:
    """The ratios of motion, then the differences of face_sim; with a star where the curve has the like nowhere."""
    cells = []
    for name in MOTIONS:
        cells.append(cell(by[name].motion, 2) + "*" * (not by[name].reached[0]) if name in by else "–")
    for name in MOTIONS:
        cells.append(cell(by[name].identity, 3) + "*" * (not by[name].reached[1]) if name in by else "–")
    return cells


def minus_hpo(rows: Sequence[MetricRow]) -> str:
    """Every method at its last step minus HPO, clip by clip: what is left of it when a part is taken away."""
    last = results.grouped(results.last_steps(rows), results.BY)
    hpo = next((own for (method, setting, _), own in last.items() if (method, setting) == ("hpo", "")), [])
    measures = measured(hpo, DIFFERENCES)
    lines = []
    for group in sorted(last, key=lambda key: (order(key[0]), key)):
        cells = _minus_cells(last[group], hpo, measures) if last[group] is not hpo else []
        if cells:
            lines.append([named(group[0], group[1]), str(group[2] or "–"), *cells])
    if not lines:
        return ""
    text = table(["method", "steps", "N", *measures], lines)
    return (
        f"## Minus HPO, clip by clip\n\n{text}\n"
        "The same person, prompt and seed, and where there are several trainings the same; N clips that both have.\n"
    )


def _minus_cells(one: Sequence[MetricRow], other: Sequence[MetricRow], measures: Sequence[str]) -> list[str]:
    """N and the differences of one method from another; empty where they share no clip."""
    found = [results.compare(other, one, name, _minus) for name in measures]
    if not any(found):
        return []
    cells = [cell(interval, DIGITS[name]) for name, interval in zip(measures, found)]
    return [str(max(interval.clips for interval in found if interval)), *cells]


def _minus(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The second method minus the first: the base model, where it is one, stands beside every training of the first."""
    return -difference(means)


def beside_paper(rows: Sequence[MetricRow], reference: Sequence[MetricRow]) -> str:
    """The paper's three tables, each number of theirs with ours beside it; empty where no method is of them."""
    last = results.grouped(results.last_steps(rows), results.BY)
    own = {method: members for (method, setting, _), members in last.items() if not setting}
    names = {m: method_name(m) + (f", {step} steps" if step else "") for m, setting, step in last if not setting}
    if not any(row.method(own) for one in paper.TABLES for row in one.rows):
        return ""
    measures = measured([row for members in own.values() for row in members], results.MEASURES)

    def shown(method: str, measure: str) -> str:
        if measure == paper.FVD:
            return number(results.fvd(own[method], reference), 1)
        return cell(results.estimate(own[method], measure), DIGITS[measure], len(own[method]))

    known = [*measures, *([paper.FVD] if reference else [])]
    tables = "\n".join(paper.markdown(one, names, known, shown) + _steps_of(one, own, measures) for one in paper.TABLES)
    return (
        f"## Beside the paper\n\n{tables}\n"
        "The paper: 40 people, 40 prompts, 61 frames of HunyuanVideo; here: as under the first table, methods without "
        "a setting of their own. Of other worlds the order compares, not the numbers.\n"
    )


def _steps_of(table_: paper.PaperTable, own: Mapping[str, Sequence[MetricRow]], measures: Sequence[str]) -> str:
    """Each row of tables 2 and 3 minus the one above it; empty without two of them."""
    if not table_.steps:
        return ""
    measures = [name for name in DIFFERENCES if name in measures]
    found = [method for row in table_.rows if (method := row.method(own))]
    lines = []
    for before, method in itertools.pairwise(found):
        cells = _minus_cells(own[method], own[before], measures)
        lines += [[f"{method_name(method)} minus {method_name(before)}", *cells]] if cells else []
    return f"\n{table(['clip by clip', 'N', *measures], lines)}" if lines else ""
