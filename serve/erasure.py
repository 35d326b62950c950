"""Everything a run directory holds of one person, removed: photos, embeddings, clips, training, pairs and rewards.

Files go before the table rows that name them, so an erasure that was interrupted is finished by doing it again. What
belongs to the base model or to others stays. Published adapters are `magicid.adapters.delete`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from magicid import schema, storage
from magicid.run import Run, clip_uri
from magicid.schema import Identity, MetricRow, ScoredClip

_REPORT = "report.html"  # holds the photos of everyone; it is made again when the job is submitted again
_FOLDERS = ("identities/{id}", "training/{id}")
_FILES = ("rewards/{id}.parquet", "pairs/{id}.parquet", "pairs/{id}.rejected.parquet")
_TABLES: dict[str, type] = {"identities/identities.parquet": Identity, "scored": ScoredClip, "evaluation": MetricRow}


def erase_person(location: str, identity_id: str) -> list[str]:
    """Remove what the run at `location` holds of `identity_id`, an id that is known to be one of the run's.

    Returns:
        What was removed or rewritten, relative to the run; [] when nothing was left.

    Raises:
        StorageError: something could not be read or removed; calling again goes on.
    """
    run = Run(location)
    found = [name.format(id=identity_id) for name in _FOLDERS + _FILES]
    gone = list(_remove(run, [*_clip_files(run, identity_id), *found]))
    for name, cls in _TABLES.items():
        gone += _without_rows(run, name, cls, identity_id)
    if gone:
        gone += _remove(run, [_REPORT])
    return gone


def _remove(run: Run, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if run.has(name):
            storage.remove(run.path(name))
            yield name


def _clip_files(run: Run, identity_id: str) -> Iterator[str]:
    """The clips that show the person; those of the base model alone are shared by all."""
    for name in ("scored", "evaluation"):
        for _, rows in _tables(run, name):
            for row in rows:
                if row["identity_id"] == identity_id and row.get("method") != "base":
                    named = [row[uri] for uri in ("video_uri", "latents_uri", "photo_uri") if row.get(uri)]
                    # Evaluation rows do not name the latents that lie beside the video.
                    yield from dict.fromkeys([*named, clip_uri(row["clip_id"], ".safetensors")])


def _without_rows(run: Run, name: str, cls: type, identity_id: str) -> Iterator[str]:
    """Write the tables again without the person's rows."""
    for location, rows in _tables(run, name):
        kept = [row for row in rows if row["identity_id"] != identity_id]
        if len(kept) < len(rows):
            storage.write_table(location, kept, schema.arrow_schema(cls))
            yield f"{name}: {len(rows) - len(kept)} rows"


def _tables(run: Run, name: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    locations = [run.path(name)] if name.endswith(".parquet") else storage.list_files(run.path(name), ".parquet")
    for location in locations:
        if storage.exists(location):
            yield location, storage.read_table(location)
