"""What becomes of a finished clip: the last pool writes its row to the run, the driver learns that it is there.

Rows carry face embeddings of every frame, and each identity has hundreds of clips: for thousands of identities that is
more than one driver should hold, or write. A part is named after the clips in it, so a block that is worked on twice,
because a machine was lost, leaves one part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from magicid import schema
from magicid.run import Run, rows_folder
from magicid.schema import CURVE_CLIP, EVALUATION_CLIP, VALIDATION_CLIP, Made, MetricRow, ScoredClip, to_row
from magicid.storage import sha256_json

LAST_KIND = "last"  # of the row that an idle source sends: the pass may end


@dataclass(frozen=True)
class Finished:
    """What leaves the pipeline: the clip, and its metrics where it is one to be measured."""

    clip: ScoredClip
    measured: MetricRow | None = None


def is_measured(clip: schema.Clip) -> bool:
    """Whether a clip is compared with one person by the table's metrics, and has a MetricRow."""
    return clip.kind in (EVALUATION_CLIP, VALIDATION_CLIP, CURVE_CLIP) and clip.identity_id is not None


def failure(clip: ScoredClip) -> str | None:
    """Why a clip should be tried again at the next start; a clip without a face is as it is."""
    return clip.error or clip.motion_error or clip.semantics_error


def keep(run: Run, rows: Sequence[Finished]) -> list[Made]:
    """Write the rows of a block; returns what the driver learns. Raises StorageError."""
    clips = [row for row in rows if row.clip.kind != LAST_KIND]
    for folder in {rows_folder(row.clip) for row in clips}:
        write(run, [row for row in clips if rows_folder(row.clip) == folder])
    return [_made(row) for row in rows]


def write(run: Run, rows: Sequence[Finished]) -> None:
    """Write rows of one folder as one part. Raises StorageError."""
    first = rows[0].clip
    name = sha256_json(sorted([row.clip.kind, row.clip.identity_id or "", row.clip.clip_id] for row in rows))[:32]
    values = [_measured(row) for row in rows] if is_measured(first) else [row.clip for row in rows]
    run.write(f"{rows_folder(first)}/part-{name}.parquet", values, MetricRow if is_measured(first) else ScoredClip)


def _made(row: Finished) -> Made:
    clip = row.clip
    error = _measured(row).error if is_measured(clip) else clip.error
    again = error if is_measured(clip) else failure(clip)
    columns = {field.name: getattr(clip, field.name) for field in dataclasses.fields(Made) if hasattr(clip, field.name)}
    return Made(**{**columns, "error": error, "again": again})


def _measured(row: Finished) -> MetricRow:
    return row.measured or unmeasured(row.clip, row.clip.error or "it was not measured")


def unmeasured(clip: schema.Clip, error: str) -> MetricRow:
    """A row without values, and why."""
    needed = [field.name for field in dataclasses.fields(MetricRow) if field.default is dataclasses.MISSING]
    nothing: dict[str, Any] = dict.fromkeys(needed)
    sizes = {"fps": 0, "frames": 0, "height": 0, "width": 0}
    return schema.from_row(MetricRow, {**nothing, **sizes, **to_row(clip), "error": error})


def given_up(clip: schema.Clip, error: str) -> Finished:
    """The row of a clip that no pool could finish."""
    return Finished(schema.from_row(ScoredClip, {**to_row(clip), "error": error}))
