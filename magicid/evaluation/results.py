"""Results: one row for each measured clip, in Parquet or JSON lines, and what a method comes to.

The rows of any number of runs, methods and places can be read together, as long as they have the columns of
`magicid.schema.MetricRow`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from magicid import schema, storage
from magicid.errors import StorageError
from magicid.evaluation.intervals import Interval, Statistic, difference, hierarchical
from magicid.schema import MetricRow

MEASURES = (
    "face_sim", "face_sim_missing0", "face_detect_rate", "dynamic_degree", "dynamic_degree_vbench",
    "dynamic_magnitude", "head_motion",
    "temporal_flickering", "warp_error", "temporal_consistency", "clip_t", "clip_i", "action", "place", "prompt_score",
)  # fmt: skip
"""The columns that have a mean; the Fréchet distance is one of sets."""
_OF_A_RUN = ("evaluation", "curve")
BY = ("method", "setting", "step")


@dataclass(frozen=True)
class Estimate:
    """One measure of one group of rows: mean and 95 % interval over people, training seeds and clips.

    `interval` is null when no clip has the measure.
    """

    group: tuple[Any, ...]
    measure: str
    interval: Interval | None
    nulls: int  # clips without it


def write(location: str, rows: Sequence[MetricRow]) -> None:
    """Write rows as Parquet, or as JSON lines where the location ends in `.jsonl`."""
    if location.endswith(".jsonl"):
        text = "".join(json.dumps(schema.to_row(row)) + "\n" for row in rows)
        storage.write_bytes(location, text.encode())
    else:
        storage.write_table(location, schema.to_rows(rows), schema.arrow_schema(MetricRow))


def read(locations: Iterable[str]) -> list[MetricRow]:
    """The rows of files (`.parquet`, `.jsonl`), of folders of them, and of run directories.

    `LOCATION=NAME` tells the methods of one run from those of another that are called the same: their setting begins
    with the name, but for the base model's and the renderer's, which are everybody's.

    A clip that comes again under the same method, setting, step, training seed and identity counts once, the last one.

    Raises:
        StorageError: nothing there, or a file without the columns.
    """
    rows: dict[tuple[Any, ...], MetricRow] = {}
    for given in locations:
        location, name = _named(given)
        for file in _files(location):
            for row in _rows(file):
                if name and row.method not in ("base", "renderer"):
                    row = dataclasses.replace(row, setting=f"{name}, {row.setting}" if row.setting else name)
                key = (row.identity_id, row.method, row.setting, row.step, row.train_seed, row.clip_id)
                rows[key] = row
    return [row for row in rows.values() if row.method != "validation"]


def _named(given: str) -> tuple[str, str]:
    """(location, name) of `LOCATION=NAME`; the name is empty where none is given: a path may have a = of its own."""
    location, equals, name = given.rpartition("=")
    return (given, "") if not equals or "/" in name or _listed(given) else (location, name)


def _files(location: str) -> list[str]:
    files = _listed(location)
    if not files:
        raise StorageError(f"{location} holds no results", "give a run directory, or .parquet or .jsonl files of rows")
    return files


def _listed(location: str) -> list[str]:
    """The files of rows of a location; empty where there are none."""
    if location.endswith((".parquet", ".jsonl")):
        return [location]
    found = [file for name in _OF_A_RUN for file in storage.list_files(storage.join(location, name))]
    return [file for file in found or storage.list_files(location) if file.endswith((".parquet", ".jsonl"))]


def _rows(file: str) -> list[MetricRow]:
    try:
        if file.endswith(".jsonl"):
            table = [json.loads(line) for line in storage.read_bytes(file).decode().splitlines() if line.strip()]
        else:
            table = storage.read_table(file)
        return [schema.from_row(MetricRow, row) for row in table]
    except (TypeError, ValueError) as error:
        raise StorageError(f"{file} holds no metric rows: {error}", "give files that magicid wrote") from error


def estimates(
    rows: Sequence[MetricRow], measures: Sequence[str] = MEASURES, by: Sequence[str] = BY, *, seed: int = 0
) -> list[Estimate]:
    """Every measure of every group of rows that agree in the fields `by`, groups in the order of their first rows."""
    found = []
    for group, members in grouped(rows, by).items():
        for measure in measures:
            interval = estimate(members, measure, seed=seed)
            count = interval.clips if interval else 0
            found.append(Estimate(group, measure, interval, len(members) - count))
    return found


def grouped(rows: Sequence[MetricRow], by: Sequence[str]) -> dict[tuple[Any, ...], list[MetricRow]]:
    """The rows that agree in the fields `by`, groups in the order of their first rows."""
    groups: dict[tuple[Any, ...], list[MetricRow]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in by), []).append(row)
    return groups


def of_usual_length(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows of clips in as many frames as most have; others are there for figure 2a alone. What could not be read
    has no frames, and stays."""
    counts = Counter(row.frames for row in rows if row.frames)
    usual = {0, *(frames for frames, _ in counts.most_common(1))}
    return [row for row in rows if row.frames in usual]


def last_steps(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows of the highest training step of each method and setting, in the usual length: at equal cost, so no
    method's beyond that of HPO, where there is one."""
    usual = of_usual_length(rows)
    most = max((row.step for row in usual if row.method == "hpo"), default=None)
    kept = []
    for members in grouped(usual, ["method", "setting"]).values():
        steps = {row.step for row in members}
        step = max([step for step in steps if most is None or step <= most] or steps)
        kept += [row for row in members if row.step == step]
    return kept


def matched(
    methods: Sequence[Sequence[MetricRow]], measures: Sequence[str], whole: str = "identity_id"
) -> list[tuple[str, int, list[float]]]:
    """(person, training seed, values) of the clips that every method has, all measures of the first method first.

    Trainings of one seed are compared, which share what is drawn. A method with one training stands beside all of the
    first where it has no steps (the base model, clips from elsewhere), and beside the one where that has one: a run may
    name one seed for SFT and another for HPO. `whole`: the field that comes first.
    """
    several = len({row.train_seed for row in methods[0]}) > 1
    found, others = [], [({_key(row): row for row in rows}, _beside_all(rows, several)) for rows in methods[1:]]
    for row in sorted(methods[0], key=lambda row: row.clip_id):
        same = [row]
        for rows, trainings in others:
            key = _key(row)
            same += [rows[key]] if key in rows else [rows[k] for k in [(*key[:-1], *trainings)] if k in rows]
        values = [getattr(clip, measure) for clip in same for measure in measures]
        if len(same) == len(methods) and all(map(_known, values)):
            found.append((str(getattr(row, whole)), row.train_seed, values))
    return found


def estimate(rows: Sequence[MetricRow], measure: str, *, seed: int = 0) -> Interval | None:
    """The mean of a measure over rows that have it, with its interval."""
    measured = sorted((row for row in rows if _known(getattr(row, measure))), key=lambda row: row.clip_id)
    return hierarchical(
        [getattr(row, measure) for row in measured],
        [row.identity_id for row in measured],
        [row.train_seed for row in measured],
        seed=seed,
    )


def fvd(rows: Sequence[MetricRow], reference: Sequence[MetricRow]) -> float | None:
    """The Fréchet video distance of rows that have features; None where there are fewer than two on a side."""
    one, other = ([row.video_features for row in side if row.video_features] for side in (rows, reference))
    if min(len(one), len(other)) < 2:
        return None
    from magicid.evaluation.metrics.video import frechet_distance  # loads torch, which reading rows does not need

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # N is in the table
        return frechet_distance(np.array(one), np.array(other))


def share_above(rows: Sequence[MetricRow], measure: str, threshold: float, *, seed: int = 0) -> Interval | None:
    """The share of clips whose measure is above a threshold; a clip without the measure is not above it."""
    ordered = sorted(rows, key=lambda row: row.clip_id)
    above = [float(_known(value := getattr(row, measure)) and value > threshold) for row in ordered]
    return hierarchical(above, [row.identity_id for row in ordered], [row.train_seed for row in ordered], seed=seed)


def compare(
    first: Sequence[MetricRow],
    second: Sequence[MetricRow],
    measure: str,
    statistic: Statistic = difference,
    *,
    seed: int = 0,
) -> Interval | None:
    """First against second over the clips of the same person, prompt, seed and training seed; None when none fits.

    What has no steps (the base model) is compared with every training of the first; see `matched`.
    """
    found = matched([first, second], [measure])
    if not found:
        return None
    people, trainings, values = zip(*found)
    return hierarchical(np.array(values), people, trainings, statistic=statistic, seed=seed)


def _key(row: MetricRow) -> tuple[Any, ...]:
    return (row.identity_id, row.prompt, row.seed, row.frames, row.train_seed)


def _beside_all(rows: Sequence[MetricRow], several: bool) -> set[int]:
    """The one training seed of rows that stand beside every training of another method; else empty."""
    seeds = {row.train_seed for row in rows}
    return seeds if len(seeds) == 1 and not (several and any(row.step for row in rows)) else set()


def _known(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))
