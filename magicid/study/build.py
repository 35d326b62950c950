"""Builds a study: a folder for any web server, and the key that stays at home.

    OUT/page/    index.html, style.css, study.js, data.js, media/     to be put on a web server
    OUT/key.json which file is of which method                        not to be put there

Each set shows a person's photos and, for one prompt and seed, a clip of every method. Files are called by random names,
and the page shuffles sets and clips anew for everybody, so that nothing tells the methods apart but what they show. The
folder holds photos of people: whoever has someone deleted from a run removes its studies too.
"""

from __future__ import annotations

import io
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from PIL import Image

from magicid import storage
from magicid.errors import StorageError
from magicid.evaluation import results
from magicid.run import Run
from magicid.schema import MetricRow

QUESTIONS = {
    "identity": "In which clip is it most clearly the person in the photos?",
    "dynamics": "In which clip does the person move most naturally and lively?",
    "text": "Which clip shows best what the text says?",
    "overall": "Which clip do you prefer, all in all?",
}
"""The paper's figure 8: identity, dynamics, text alignment, overall preference."""
PHOTOS, PHOTO_SIDE = 4, 320
PAGE, KEY = "page", "key.json"


@dataclass(frozen=True)
class Comparison:
    """One set: the clips of all methods for one person, prompt and seed; locations of files."""

    identity_id: str
    prompt: str
    photos: list[str]
    clips: dict[str, str]  # method -> location


def build(
    run: str, methods: Sequence[str], out: str, *, sets: int = 20, seed: int = 0, others: Sequence[str] = ()
) -> int:
    """Write the study; returns how many sets it has.

    Args:
        run: run directory whose people are shown.
        methods: as in its rows (base, sft, hpo), or in those of `others`.
        out: folder, on any fsspec URL.
        sets: at most so many, spread over the people.
        seed: of the choice of sets.
        others: folders of rows of clips from elsewhere (`magicid evaluate`) of the same people, prompts and seeds.

    Raises:
        StorageError: fewer than two methods, a study that is there already, or no clips that all methods have.
    """
    if len(set(methods)) < 2:
        raise StorageError("a study compares at least two methods", "name them: --methods base,sft,hpo")
    if storage.exists(storage.join(out, KEY)):
        raise StorageError(f"{out} holds a study already", "its answers need its key; give another --out")
    chosen = choose(comparisons(run, methods, others), sets, seed)
    identifier = secrets.token_hex(8)
    data: dict[str, Any] = {"study": identifier, "questions": QUESTIONS, "sets": []}
    key: dict[str, Any] = {"study": identifier, "methods": list(dict.fromkeys(methods)), "clips": {}, "sets": {}}
    photos: dict[str, str] = {}
    for number, found in enumerate(chosen):
        name = f"set-{number + 1:03d}"
        shown: dict[str, Any] = {"set": name, "prompt": found.prompt, "photos": [], "clips": []}
        for location in found.photos:
            if location not in photos:
                photos[location] = _put(out, _photo(storage.read_bytes(location)), ".jpg")
            shown["photos"].append(photos[location])
        for method, location in found.clips.items():
            file = _put(out, storage.read_bytes(location), ".mp4")
            shown["clips"].append(file)
            key["clips"][file] = method
        shown["clips"].sort()  # random names: their order says nothing
        data["sets"].append(shown)
        key["sets"][name] = {"identity": found.identity_id, "prompt": found.prompt}
    files = resources.files("magicid.study") / "page"
    for name in ("index.html", "style.css", "study.js"):
        storage.write_bytes(storage.join(out, PAGE, name), (files / name).read_bytes())
    storage.write_bytes(storage.join(out, PAGE, "data.js"), f"const STUDY = {json.dumps(data, indent=1)};\n".encode())
    storage.write_json(storage.join(out, KEY), key)
    return len(chosen)


def comparisons(run: str, methods: Sequence[str], others: Sequence[str] = ()) -> list[Comparison]:
    """Every person, prompt and seed of which all methods have a clip, at the last training step of each.

    Raises StorageError when there is none.
    """
    place = Run(run)
    clips: dict[tuple[str, str, int], dict[str, str]] = {}
    for location in (run, *others):
        rows = [row for row in results.last_steps(results.read([location])) if row.method in methods]
        for row in rows:
            if row.video_uri is not None:
                at = place.path(row.video_uri) if location == run else row.video_uri
                clips.setdefault(_key(row), {})[row.method] = at
    whole = {key: found for key, found in clips.items() if set(found) == set(methods)}
    if not whole:
        have = sorted({method for found in clips.values() for method in found})
        raise StorageError(
            f"no prompt and seed has a clip of each of {', '.join(methods)}",
            f"there are clips of {', '.join(have) or 'nothing'}; evaluate all methods on the same prompts and seeds",
        )
    photos = {person: [place.path(uri) for uri in place.identity(person).photos[:PHOTOS]] for person, _, _ in whole}
    return [Comparison(key[0], key[1], photos[key[0]], whole[key]) for key in sorted(whole)]


def choose(found: Sequence[Comparison], count: int, seed: int) -> list[Comparison]:
    """At most `count` of them, drawn at random, every person as often as every other as long as they last."""
    draw = random.Random(seed)
    of_person: dict[str, list[Comparison]] = {}
    for comparison in found:
        of_person.setdefault(comparison.identity_id, []).append(comparison)
    for own in of_person.values():
        draw.shuffle(own)
    chosen: list[Comparison] = []
    while len(chosen) < count and any(of_person.values()):
        people = [person for person, own in sorted(of_person.items()) if own]
        draw.shuffle(people)
        chosen += [of_person[person].pop() for person in people[: count - len(chosen)]]
    return chosen


def _key(row: MetricRow) -> tuple[str, str, int]:
    return row.identity_id, row.prompt, row.seed


def _put(out: str, data: bytes, suffix: str) -> str:
    """Write a file under a random name; returns its location relative to the page."""
    name = f"media/{secrets.token_hex(8)}{suffix}"
    storage.write_bytes(storage.join(out, PAGE, name), data)
    return name


def _photo(data: bytes) -> bytes:
    """A photo made small, without what its file says of it."""
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
        small.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
