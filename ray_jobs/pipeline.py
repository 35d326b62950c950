"""Wanted clips -> generated clips -> scored clips, on Ray Data.

    requests ─ GenerateClips ─ ScoreIdentity ─ ScoreMotion ─ ScoreSemantics ─▶ scored/part-*.parquet
    requests ─ GenerateClips ─ MeasureClips ─▶ evaluation/part-*.parquet

Finished rows are written in small parts as they come, so an interrupted pass repeats at most the last few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from magicid import schema
from magicid.recipe import Recipe
from magicid.run import Run
from magicid.schema import Clip, Identity, MetricRow, ScoredClip
from ray_jobs import pools
from ray_jobs.stages import GenerateClips, MeasureClips, ScoreIdentity, ScoreMotion, ScoreSemantics

ROWS_PER_BLOCK = 4  # clips that travel together; small, so that pools overlap and little is lost with a node
ROWS_PER_PART = 8

Progress = Callable[[int, Any], None]  # how many of the wanted rows are done, and the newest (None at first)


def score(recipe: Recipe, run: Run, wanted: Sequence[Clip], job: str, progress: Progress) -> list[ScoredClip]:
    """Generate and score the wanted clips; returns one row per wanted clip, finished earlier or now.

    A clip that was given up, or a model that failed on it, at an earlier start is tried again.
    """
    done = best(run.read_parts("scored", ScoredClip))
    unique = {clip.clip_id: clip for clip in wanted}
    missing = [clip for key, clip in unique.items() if key not in done or failure(done[key])]
    progress(len(unique) - len(missing), None)
    if missing:
        arguments = {"recipe": recipe.model_dump(mode="json"), "run": run.location, "job": job}
        dataset = _generated(recipe, missing, arguments)
        for stage, pool in (
            (ScoreIdentity, recipe.resources.identity),
            (ScoreMotion, recipe.resources.motion),
            (ScoreSemantics, recipe.resources.semantics),
        ):
            dataset = pools.add_stage(dataset, stage, pool, arguments, ROWS_PER_BLOCK)
        done |= best(_collect(dataset, run, "scored", ScoredClip, progress, len(unique) - len(missing)))
    return [done[clip.clip_id] for clip in wanted]


def evaluate(
    recipe: Recipe, run: Run, wanted: Sequence[Clip], identities: Sequence[Identity], job: str, progress: Progress
) -> list[MetricRow]:
    """Generate the evaluation clips and measure each against the references of its `identity_id`."""
    done = {(row.clip_id, row.identity_id): row for row in run.read_parts("evaluation", MetricRow) if row.error is None}
    missing = [clip for clip in wanted if (clip.clip_id, clip.identity_id) not in done]
    progress(len(wanted) - len(missing), None)
    if missing:
        arguments = {"recipe": recipe.model_dump(mode="json"), "run": run.location, "job": job}
        dataset = _generated(recipe, missing, arguments)
        people = {"identities": schema.to_rows(identities)}
        pool = recipe.resources.identity
        dataset = pools.add_stage(dataset, MeasureClips, pool, {**arguments, **people}, ROWS_PER_BLOCK)
        for row in _collect(dataset, run, "evaluation", MetricRow, progress, len(wanted) - len(missing)):
            done[(row.clip_id, row.identity_id)] = row
    return [done[(clip.clip_id, str(clip.identity_id))] for clip in wanted]


def failure(clip: ScoredClip) -> str | None:
    """Why a clip should be tried again at the next start; a clip without a face is as it is."""
    return clip.error or clip.motion_error or clip.semantics_error


def best(rows: Sequence[ScoredClip]) -> dict[str, ScoredClip]:
    """Each clip once: the row of a try that went well before that of one that failed. Parts have no order."""
    kept: dict[str, ScoredClip] = {}
    for row in rows:
        if row.clip_id not in kept or failure(kept[row.clip_id]):
            kept[row.clip_id] = row
    return kept


def blocks(clips: Sequence[Clip]) -> list[list[Clip]]:
    """The clips in blocks of about ROWS_PER_BLOCK. Rows of one clip share a block: one actor makes it, once."""
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.clip_id, []).append(clip)
    found: list[list[Clip]] = [[]]
    for group in groups.values():
        if len(found[-1]) >= ROWS_PER_BLOCK:
            found.append([])
        found[-1] += group
    return found


def _generated(recipe: Recipe, clips: Sequence[Clip], arguments: dict[str, Any]) -> ray.data.Dataset:
    """The clips through the generator pool."""
    arrow = schema.arrow_schema(Clip)
    pools.configure()
    tables = [pa.Table.from_pylist(schema.to_rows(block), schema=arrow) for block in blocks(clips)]
    return pools.add_stage(
        ray.data.from_arrow(tables), GenerateClips, recipe.resources.generator, arguments, ROWS_PER_BLOCK
    )


def _collect(
    dataset: ray.data.Dataset, run: Run, folder: str, cls: type, progress: Progress, earlier: int
) -> list[Any]:
    rows: list[Any] = []
    part: list[Any] = []
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():  # type: ignore[union-attr]
                part.append(schema.from_row(cls, row))
                progress(earlier + len(rows) + len(part), part[-1])
            if len(part) >= ROWS_PER_PART:
                run.append(folder, part, cls)
                rows, part = rows + part, []
    finally:  # an interrupted pass keeps what had come
        run.append(folder, part, cls)
    return rows + part
