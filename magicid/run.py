"""A run directory: everything one job makes, under one fsspec URL. The only place where its layout is spelled.

recipe.toml  run.json                       the resolved recipe and what made the run
prompts.parquet
identities/<id>/                            identity.parquet (one row) photo-N.png; ahead.json before its turn
clips/<c2>/<clip_id>.mp4 .safetensors       content-addressed clips and their latents
text/<hash>.safetensors                     text embeddings, one file per prompt; of photos' captions one per clip
scored/<id>/part-*.parquet                  clips with their rewards; <id> is _shared for V_s
rewards/<id>.parquet                        what selection saw: raw rewards, 1..10, fronts
training/<id>/<stage>/                      checkpoints, log.parquet, lora.safetensors
pairs/<id>.parquet  pairs/<id>.rejected.parquet
adapters/<id>/<version>/                    published adapters
evaluation/<id>/part-*.parquet              metric rows
made/part-*.parquet                         held-out clips of the base model, measured against each identity
rejected.parquet  report.html
ledger/                                     how every identity stands: snapshot-*.parquet, events-*.jsonl
driver/                                     who drives the run: lease and heartbeat, by fence
commands/                                   what `magicid cancel` and `magicid retry` ask of the driver
attempts/<start>/  ray_train/               while the job runs: tries of each clip; Ray Train's own files
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

from magicid import __version__, schema, storage
from magicid import recipe as recipes
from magicid.errors import MagicIDError, StorageError
from magicid.recipe import Recipe
from magicid.schema import Clip, Identity

T = TypeVar("T")


class Run:
    """Paths and tables of one run directory. `location` is a local path or an fsspec URL."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")

    def path(self, *parts: str) -> str:
        """The full location of a relative URI."""
        return storage.join(self.location, *parts)

    def open(self, recipe: Recipe, base_sha256: str) -> None:
        """Begin or continue a run.

        Raises:
            StorageError: another recipe or base model began it, or it cannot be written.
        """
        storage.check_writable(self.location)
        marker = self.path("run.json")
        if storage.exists(marker):
            found = storage.read_json(marker)
            if found["recipe_sha256"] != recipe.content_sha256 and not self._keeps(recipe):
                raise StorageError(
                    f"{self.location} was begun with another recipe (hash {found['recipe_sha256'][:12]}, "
                    f"now {recipe.content_sha256[:12]})",
                    "give another --out, or the recipe kept there as recipe.toml",
                )
            if found["base_sha256"] != base_sha256:
                raise StorageError(
                    f"{self.location} was begun with base model {found['base_sha256'][:12]}, now {base_sha256[:12]}",
                    "give another --out, or the base model of that run",
                )
            return
        storage.write_bytes(self.path("recipe.toml"), recipe.to_toml().encode())
        content = {"recipe_sha256": recipe.content_sha256, "recipe": recipe.name, "base_sha256": base_sha256}
        storage.write_json(marker, {**content, "magicid": __version__})

    def recipe(self) -> Recipe:
        """The recipe that began the run, with today's defaults for keys that came later.

        Raises:
            RecipeError: it holds a key or value that is known no longer.
            StorageError: it is not there.
        """
        return recipes.from_toml(storage.read_bytes(self.path("recipe.toml")).decode(), "recipe.toml of the run")

    def _keeps(self, recipe: Recipe) -> bool:
        """Whether the kept recipe makes what this one makes: a version with new keys has other hashes for both."""
        try:
            return self.recipe().content_sha256 == recipe.content_sha256
        except MagicIDError:
            return False

    def write(self, name: str, values: Sequence[Any], cls: type) -> None:
        """Write dataclasses as one Parquet table, `name` relative to the run."""
        storage.write_table(self.path(name), schema.to_rows(values), schema.arrow_schema(cls))

    def read(self, name: str, cls: type[T]) -> list[T]:
        """Read one Parquet table as dataclasses."""
        return [schema.from_row(cls, row) for row in storage.read_table(self.path(name))]

    def has(self, name: str) -> bool:
        """Whether a file of the run is there."""
        return storage.exists(self.path(name))

    def identity(self, identity_id: str) -> Identity:
        """One checked identity. Raises StorageError when it is not there."""
        return self.read(identity_uri(identity_id), Identity)[0]

    def identity_ids(self) -> list[str]:
        """Ids of all checked identities, in order."""
        files = storage.list_files(self.path("identities"), "/identity.parquet")
        return sorted(file.split("/")[-2] for file in files)

    def append(self, folder: str, values: Iterable[Any], cls: type) -> None:
        """Add a part to a table that grows: parts are whole or absent, never changed."""
        rows = list(values)
        if rows:
            self.write(f"{folder}/part-{uuid.uuid4().hex}.parquet", rows, cls)

    def read_parts(self, folder: str, cls: type[T], without: Collection[str] = ()) -> list[T]:
        """All rows of a growing table; [] when it has not begun. Order is not kept.

        Args:
            without: large columns that are not read; they have their defaults.
        """
        files = storage.list_files(self.path(folder), ".parquet")
        columns = [field.name for field in dataclasses.fields(cls) if field.name not in without]  # type: ignore[arg-type]
        return [schema.from_row(cls, row) for file in files for row in storage.read_table(file, columns)]


def identity_uri(identity_id: str) -> str:
    """Where a checked identity lies, one row, relative to the run."""
    return f"identities/{identity_id}/identity.parquet"


def ahead_uri(identity_id: str) -> str:
    """Where lies what was found of an identity that has not been begun, relative to the run."""
    return f"identities/{identity_id}/ahead.json"


def rows_folder(clip: Clip) -> str:
    """Where the row of a clip is kept, in parts, relative to the run."""
    if clip.kind == schema.BASE_CLIP:
        return "scored/_shared"
    if clip.kind == schema.CURVE_CLIP:
        return f"curve/{clip.identity_id}"
    if clip.kind in (schema.EVALUATION_CLIP, schema.VALIDATION_CLIP):
        return f"evaluation/{clip.identity_id}" if clip.identity_id else "made"
    return f"scored/{clip.identity_id}"


def clip_uri(clip_id: str, suffix: str) -> str:
    """Where a clip's file lies, relative to the run: `.mp4` or `.safetensors`."""
    return f"clips/{clip_id[:2]}/{clip_id}{suffix}"


def text_uri(prompt: str, text_settings_sha256: str) -> str:
    """Where a prompt's text embeddings lie, relative to the run."""
    return f"text/{storage.sha256_json([prompt, text_settings_sha256])[:24]}.safetensors"


def caption_uri(clip_id: str) -> str:
    """Where the text embeddings of a photo's caption lie, relative to the run: under the id of its clip."""
    return f"text/{clip_id}.safetensors"


def training_uri(identity_id: str, stage: str, name: str) -> str:
    """Where a training stage (`sft` or `hpo`) of one identity keeps a file, relative to the run."""
    return f"training/{identity_id}/{stage}/{name}"
