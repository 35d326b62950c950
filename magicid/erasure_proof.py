"""What is left of a person in a run, after `erasure`: every remaining file is looked at, by name and by content.

Tables, JSON and text are read whole; of safetensors the header, which holds all names; pictures and clips tell nothing
but their names, which are content addresses. What was made of the person is known by the hashes the person's own files
gave before they were removed (`erasure.traces_of`).
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from magicid import storage
from magicid.erasure import AT_ONCE, HEX, TOMBSTONES, files, mentions, named, names_in_path
from magicid.errors import StorageError
from magicid.run import Run

_SENTENCES = (".html", ".txt", ".md", ".log", ".csv")
_HEADER = 1 << 16
# Of the run, not of people, and hashed before anybody is read: a recipe may well say "hpo" where somebody has that id.
_OF_THE_RUN = frozenset({"recipe.toml", "run.json", "prompts.parquet"})


@dataclass(frozen=True)
class Proof:
    """What a scan saw: files by how they were looked at, and those that still name the person, each with the reason."""

    scanned: Counter[str] = field(default_factory=Counter)
    found: list[tuple[str, str]] = field(default_factory=list)


def scan(location: str, identity_id: str, marks: set[str]) -> Proof:
    """Look at every file of a run.

    Args:
        marks: hashes of what was made of the person, from before the erasure.

    Raises:
        StorageError: the run cannot be listed.
    """
    run, proof = Run(location), Proof()

    def look(name: str) -> tuple[str, bool, str]:
        try:
            return (*_look(run, name, identity_id, marks), "its content")
        except (StorageError, ValueError, pa.ArrowException) as error:
            return "", run.has(name), f"it cannot be read: {error}"  # unless it went meanwhile

    names = files(run)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, (how, hit, why) in zip(names, pool.map(look, names)):
            if names_in_path(name, identity_id, marks):
                proof.found.append((name, "its name"))
            if hit:
                proof.found.append((name, why))
            if how:
                proof.scanned[how] += 1
    return proof


def _look(run: Run, name: str, identity_id: str, marks: set[str]) -> tuple[str, bool]:
    location = run.path(name)
    if name.startswith(f"{TOMBSTONES}/"):  # hashes, of an id and of clips that must not come back
        return "names alone", False
    if name in _OF_THE_RUN:
        data = storage.read_bytes(location)
        return "read", not marks.isdisjoint(HEX.findall(data.decode(errors="replace")))
    if name.endswith(".parquet"):
        return "tables", any(named(row, identity_id, marks) for row in storage.read_table(location))
    if name.endswith((".json", ".jsonl")):
        text = storage.read_bytes(location).decode()
        values = [json.loads(line) for line in text.splitlines() if line] if name.endswith("l") else [json.loads(text)]
        return "JSON", named(values, identity_id, marks)
    if name.endswith(_SENTENCES):
        text = storage.read_bytes(location).decode(errors="replace")
        return "texts", mentions(text, identity_id) or not marks.isdisjoint(HEX.findall(text))
    if name.endswith(".safetensors"):
        return "safetensors headers", named(_header(location), identity_id, marks)
    return "names alone", False


def _header(location: str) -> list[object]:
    """The tensor names and metadata of a safetensors file, JSON inside the metadata read as such."""
    data = storage.read_bytes(location, _HEADER)
    length = int.from_bytes(data[:8], "little")
    if 8 + length > storage.file_size(location):
        raise ValueError("not a whole safetensors file")
    if len(data) < 8 + length:
        data = storage.read_bytes(location, 8 + length)
    content: dict[str, object] = json.loads(data[8 : 8 + length])
    metadata = content.pop("__metadata__", {})
    values: list[object] = list(content)
    for value in metadata.values() if isinstance(metadata, dict) else ():
        try:
            values.append(json.loads(value))
        except ValueError:
            values.append(value)
    return values
