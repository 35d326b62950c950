"""Clips from elsewhere: a folder of videos of known people and prompts, measured like the project's own.

clips/clips.jsonl      {"file": "ada/1.mp4", "identity": "ada", "prompt": "a person nods", "seed": 1}, one a line
clips/ada/a person nods on the beach.mp4        without that file: person and prompt by the path
clips/ada/a person nods on the beach #7.mp4     and a seed
clips/anything.mp4     where nobody is to be recognised: the reference folder of the Fréchet video distance
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magicid import schema, storage
from magicid.clips import read_clip
from magicid.errors import MagicIDError, StorageError
from magicid.evaluation.metrics import COLUMNS, Metrics, Sample
from magicid.schema import MetricRow

if TYPE_CHECKING:
    from magicid.manifests import ManifestRow

INDEX = "clips.jsonl"
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
_SEED = re.compile(r"\s*#(\d+)$")


@dataclass(frozen=True)
class ForeignClip:
    """One clip of the folder; `location` is where it lies."""

    location: str
    identity_id: str
    prompt: str
    seed: int

    @property
    def clip_id(self) -> str:
        """A hash of where it lies and what it stands for."""
        return storage.sha256_json([self.location, self.identity_id, self.prompt, self.seed])[:32]


@dataclass(frozen=True)
class Person:
    """What clips are compared with: unit embeddings (N, D) by the metric recogniser, and the photos."""

    references: NDArray[np.float32] | None
    photos: list[NDArray[np.uint8]]


def list_clips(folder: str, *, of_people: bool = True) -> list[ForeignClip]:
    """The clips of a folder, by its index or by its paths; without people any video in it is a clip.

    Raises:
        StorageError: none, or a line or path that is no clip.
    """
    index = storage.join(folder, INDEX)
    if storage.exists(index):
        lines = storage.read_bytes(index).decode().splitlines()
        found = [_from_line(folder, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        names = [name for name in storage.list_relative(folder) if name.lower().endswith(_VIDEOS)]
        found = [
            _from_path(folder, name) if of_people else ForeignClip(storage.join(folder, name), "", "", 0)
            for name in sorted(names)
        ]
    if not found:
        raise StorageError(f"{folder} holds no clips", f"put {INDEX} there, or videos as <identity>/<prompt>.mp4")
    return found


def _from_line(folder: str, number: int, line: str) -> ForeignClip:
    try:
        row = json.loads(line)
        file, person, prompt = str(row["file"]), str(row["identity"]), str(row["prompt"])
        seed = int(row.get("seed", 0))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{INDEX}, line {number}: {type(error).__name__}: {error}", "each line needs file, identity and prompt"
        ) from error
    return ForeignClip(storage.join(folder, file), person, prompt, seed)


def _from_path(folder: str, name: str) -> ForeignClip:
    path = PurePosixPath(name)
    if len(path.parts) != 2:
        raise StorageError(f"{name} is not <identity>/<prompt>.mp4", f"name the files so, or put {INDEX} there")
    seed = _SEED.search(path.stem)
    prompt = _SEED.sub("", path.stem)
    return ForeignClip(storage.join(folder, name), path.parts[0], prompt, int(seed[1]) if seed else 0)


def measure_one(clip: ForeignClip, people: dict[str, Person] | None, metrics: Metrics, method: str) -> MetricRow:
    """The row of one clip; one that cannot be read has nulls and a reason. Without `people` nobody is compared."""
    asked = {
        "clip_id": clip.clip_id, "identity_id": clip.identity_id, "method": method, "prompt": clip.prompt,
        "seed": clip.seed, "video_uri": clip.location,
    }  # fmt: skip
    person = people.get(clip.identity_id) if people is not None else Person(None, [])
    try:
        if person is None:
            raise StorageError(f"nobody is called {clip.identity_id!r} in the manifest", "correct the clip's identity")
        frames, fps = read_clip(clip.location)
        (values,) = metrics.measure_many([Sample(frames, fps, clip.prompt, person.references, person.photos)])
    except MagicIDError as error:
        sizes = dict.fromkeys(("fps", "frames", "height", "width"), 0)
        values = {**dict.fromkeys(COLUMNS), **sizes, "error": str(error)}
    return schema.from_row(MetricRow, {**values, **asked})


def read_people(rows: Sequence[ManifestRow], metrics: Metrics, decode: Callable[[str], Any]) -> dict[str, Person]:
    """The people of a manifest, their photos embedded by the metric recogniser.

    Args:
        decode: location of a photo to RGB (H, W, 3); may raise MagicIDError, then the photo is left out.

    Raises:
        StorageError: nobody has a usable photo.
    """
    people = {}
    for row in rows:
        photos = []
        for location in row.photos:
            try:
                photos.append(decode(location))
            except MagicIDError:
                continue
        references = _references(metrics, photos)
        if photos and (metrics.faces is None or references is not None):
            people[row.id] = Person(references, photos)
    if not people:
        raise StorageError("nobody in the manifest has a photo with a face", "check the manifest's photos")
    return people


def _references(metrics: Metrics, photos: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32] | None:
    if metrics.faces is None:
        return None
    found = [metrics.faces.embed(photo[None])[0] for photo in photos]
    good = [embedding for embedding in found if np.isfinite(embedding).all()]
    return np.stack(good) if good else None
