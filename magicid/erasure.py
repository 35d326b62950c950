"""Everything a run directory holds of one person, removed, so that the person does not come back.

A tombstone comes first, `erased/<sha256 of the id>.json`: `erased` tells a driver whom to refuse and to let go of. Then
files, then the rows of shared tables that name them, so an erasure that was interrupted is finished by doing it again.
What belongs to the base model or to others stays. `erasure_proof` looks at what is left.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from magicid import adapters, repository, schema, storage
from magicid.errors import AdapterError, IdentityError, MagicIDError, StorageError
from magicid.run import Run, caption_uri, clip_uri, training_uri
from magicid.schema import Prompt

TOMBSTONES = "erased"
AT_ONCE = 16  # files read or removed at the same time: object stores answer slowly, but many at once
# Folders whose entries are named like the person they are of, as `<id>/...` or `<id>.<ending>`.
PERSONAL = frozenset({"identities", "scored", "rewards", "training", "pairs", "adapters", "evaluation", "curve"})
# Folders whose files belong to no one person: named by content, or by a start of the job.
_IMPERSONAL = frozenset({"clips", "text", "ledger", "driver", "commands", "ray_train", TOMBSTONES})
_REPORT = "report.html"  # holds the photos of everyone; made again by the driver or `magicid report`
_ID_FIELDS = ("identity_id", "task_id", "name", "id")
_TEXT_FIELDS = ("name", "problem")  # of what was set aside: sentences that name people
_HASHES = ("clip_id", "pair_id", "video_sha256", "latents_sha256", "adapter_sha256", "sha256", "version")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
HEX = re.compile(r"[0-9a-f]{12,}")


def tombstone(identity_id: str) -> str:
    """What `erased` says of an id: SHA-256 of it in small letters, for ids that differ in case alone are one person."""
    return storage.sha256_bytes(identity_id.lower().encode())


def erased(run: str) -> set[str]:
    """The tombstones of a run: whose `tombstone` is among them may not be taken up, or go on. Raises StorageError."""
    files = storage.list_files(storage.join(run, TOMBSTONES), ".json")
    return {file.rsplit("/", 1)[-1].removesuffix(".json") for file in files}


def find_runs(location: str) -> list[str]:
    """The run directories at or below a location; the inside of a run is not looked at.

    Raises:
        StorageError: there is none, or it cannot be listed.
    """
    found, folders = [], [location.rstrip("/")]
    while folders:
        folder = folders.pop()
        names, below = storage.list_folder(folder)
        if {"run.json", "adapters"} & {*names, *below}:
            found.append(folder)
        else:
            folders += [storage.join(folder, name) for name in below]
    if not found:
        raise StorageError(
            f"{storage.public_name(location)} is no run directory and holds none", "give the --out of a run"
        )
    return sorted(found)


def delete(location: str, identity_id: str) -> list[str]:
    """`erase_person`, and the person's published adapters with their aliases.

    Raises:
        IdentityError: not an id.
        StorageError: something could not be read or removed; calling again goes on.
    """
    gone = erase_person(location, identity_id)
    with suppress(AdapterError):  # it has none
        gone += [f"adapters/{identity_id}/{version}" for version in adapters.delete(location, identity_id)]
    return gone


def keep_in_hand(location: str, identity_id: str, clip_ids: Iterable[str]) -> None:
    """Note in a person's tombstone which clips were being made when the driver heard of it; no row names them yet.

    Raises:
        StorageError: it could not be written.
    """
    file = Run(location).path(TOMBSTONES, f"{tombstone(identity_id)}.json")
    found = storage.read_json(file)
    storage.write_json(file, {**found, "in_hand": sorted({*found.get("in_hand", []), *clip_ids})})


def sweep(location: str, identity_id: str) -> None:
    """Remove what workers wrote of an erased person before they heard of it. It looks where such things lie, and at
    nothing else, so it is cheap in a large run.

    Raises:
        StorageError: something could not be read or removed; calling again goes on.
    """
    run = Run(location)
    marks = traces_of(run, identity_id)
    clips = [clip_uri(mark, suffix) for mark in marks for suffix in (".mp4", ".safetensors")]
    clips += [caption_uri(mark) for mark in marks]
    own = [
        f"{folder}/{identity_id}{end}" for folder in sorted(PERSONAL) for end in ("", ".parquet", ".rejected.parquet")
    ]
    _remove(run, clips)  # before the tables that name them
    with suppress(AdapterError):
        adapters.delete(location, identity_id)
    _remove(run, own)


def erase_person(location: str, identity_id: str) -> list[str]:
    """Remove what the run at `location` holds of a person, all but published adapters: those an endpoint needs to the
    end, to know whose they are.

    Returns:
        What was removed or rewritten, relative to the run; [] when nothing was left.

    Raises:
        IdentityError: not an id.
        StorageError: something could not be read or removed; calling again goes on.
    """
    if not _ID.fullmatch(identity_id):
        raise IdentityError(f"{identity_id!r} is not an identity's id", "use letters, digits, - and _")
    run, key = Run(location), tombstone(identity_id)
    marks = traces_of(run, identity_id)  # before a driver hears of it and removes the tables that tell them
    if key not in erased(location):
        content = {"erased": datetime.now(UTC).isoformat(timespec="seconds")}
        storage.write_json(run.path(TOMBSTONES, f"{key}.json"), content)
    marks |= traces_of(run, identity_id)
    gone: list[str] = []
    own, shared = [], []
    for name in files(run):
        if names_in_path(name, identity_id, marks):
            own += [] if name.startswith("adapters/") else [name]
        elif name.split("/")[0] not in PERSONAL | {"clips", "text", "attempts", "ray_train", TOMBSTONES}:
            shared.append(name)
    for name in shared:  # before the person's own tables, from which the traces are read
        gone += _without(run, name, identity_id, marks)
    whole = [_whole(name) for name in own]
    gone += _remove(run, [name for name in whole if name.split("/")[0] not in PERSONAL])
    gone += _remove(run, [name for name in whole if name.split("/")[0] in PERSONAL])
    if gone and run.has(_REPORT):
        gone += _remove(run, [_REPORT])
    return gone


def traces_of(run: Run, identity_id: str) -> set[str]:
    """Hashes by which the run names what was made of a person, from the person's own files: clips, pairs, adapters.

    Clips are named by what they were made from, so those that no row has yet are among them; and those that a driver
    had in hand when it heard of the erasure. Those of the shared base model are not.
    """
    rows = [row for folder in ("scored", "evaluation", "curve", "pairs") for row in _rows(run, folder, identity_id)]
    rows = [row for row in rows if row.get("method") != "base"]
    manifests = storage.list_files(run.path("adapters", identity_id), f"/{adapters.MANIFEST_NAME}")
    sources = [partial(storage.read_json, file) for file in manifests]
    for read in [*sources, partial(_wanted, run, identity_id), partial(_in_hand, run, identity_id)]:
        try:
            found = read()
            rows += found if isinstance(found, list) else [found]
        except (MagicIDError, ValueError, KeyError):  # damaged or not there; it is removed all the same
            continue
    marks = {str(row[name]) for row in rows for name in _HASHES if row.get(name)}
    return {mark for mark in marks if HEX.fullmatch(mark)}


def _rows(run: Run, folder: str, identity_id: str) -> Iterator[dict[str, Any]]:
    """The rows of the person's own tables in a folder."""
    one = run.path(folder, f"{identity_id}.parquet")
    for file in storage.list_files(run.path(folder, identity_id), ".parquet") + ([one] if storage.exists(one) else []):
        yield from storage.read_table(file)


def _in_hand(run: Run, identity_id: str) -> list[dict[str, Any]]:
    """What a driver had in hand, by the person's tombstone. Raises StorageError where there is none."""
    found = storage.read_json(run.path(TOMBSTONES, f"{tombstone(identity_id)}.json"))
    return [{"clip_id": name} for name in found.get("in_hand", [])]


def _wanted(run: Run, identity_id: str) -> list[dict[str, Any]]:
    """The clips that the run's recipe makes of the person. Raises StorageError and others where parts of it lack."""
    recipe = run.recipe()
    base, person = str(storage.read_json(run.path("run.json"))["base_sha256"]), run.identity(identity_id)
    prompts = run.read("prompts.parquet", Prompt) if run.has("prompts.parquet") else []
    training, heldout = ([p for p in prompts if p.split == split] for split in ("training", "heldout"))
    own = recipe.for_identity(person.overrides)
    clips = [*repository.static_clips(own, base, person), *repository.moving_clips(own, base, person)]
    for stage in ("sft", "hpo"):
        uri = training_uri(identity_id, stage, adapters.WEIGHTS_NAME)
        kept = storage.list_files(run.path(training_uri(identity_id, stage, "steps")), ".safetensors")
        for file in ([run.path(uri)] if run.has(uri) else []) + kept:
            adapter = repository.AdapterRef(uri, storage.sha256_bytes(storage.read_bytes(file)))
            if training and file not in kept:
                trained = repository.trained_clips(recipe, base, training, person, adapter)
                clips += [*trained, *repository.still_clips(trained)]
            if heldout:  # of the adapters on the way too: the curves
                clips += repository.evaluation_clips(recipe, base, heldout, person.class_word, stage, person, adapter)
    return schema.to_rows(clips)


def files(run: Run) -> list[str]:
    """All files of a run, relative to it, also what was half written when a machine went. Raises StorageError."""
    return storage.list_relative(run.location)


def names_in_path(name: str, identity_id: str, marks: Iterable[str]) -> bool:
    """Whether a location relative to a run is of the person: by the id where the layout has ids, or by a hash."""
    folder, _, rest = name.partition("/")
    parts = [part.lstrip(".").split(".")[0] for part in rest.split("/") if part]  # `.ada.parquet.1f3a.partial` too
    if folder in PERSONAL:
        return parts[:1] == [identity_id] or not set(marks).isdisjoint(HEX.findall(name))
    if folder == "attempts" and any(part == f"identity-{identity_id}" or f"-{identity_id}-" in part for part in parts):
        return True  # or `<stage>-<id>-<clip>`; that of somebody whose id is longer may go too: it only counts tries
    if folder not in _IMPERSONAL and identity_id in parts:
        return True
    return not set(marks).isdisjoint(HEX.findall(name))


def mentions(text: str, identity_id: str) -> bool:
    """Whether a sentence names the person: the id as a whole word."""
    return re.search(rf"(?<![\w-]){re.escape(identity_id)}(?![\w-])", text) is not None


def named(value: Any, identity_id: str, marks: set[str], key: str = "") -> bool:
    """Whether a JSON value or table cell, that of the field `key`, is about the person: an id field, a location in the
    run, a sentence on what was set aside, or a hash."""
    if isinstance(value, dict):
        return any(k == identity_id or named(v, identity_id, marks, str(k)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return any(named(each, identity_id, marks, key) for each in value)
    if not isinstance(value, str):
        return False
    return (
        (key in _ID_FIELDS and value == identity_id)
        or (key in _TEXT_FIELDS and mentions(value, identity_id))
        or ("/" in value and any(names_in_path(word, identity_id, marks) for word in value.split()))
        or not marks.isdisjoint(HEX.findall(value))
    )


def _whole(name: str) -> str:
    """The person's whole folder where a file lies in one."""
    parts = name.split("/")
    if parts[0] in PERSONAL and parts[1].startswith("."):
        return name
    return "/".join(parts[:2]) if parts[0] in PERSONAL else name


def _remove(run: Run, names: Iterable[str]) -> list[str]:
    """Remove files and folders that are there, several at a time; returns them."""
    listed = list(dict.fromkeys(names))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda name: storage.remove(run.path(name)), listed))
    return listed


def _without(run: Run, name: str, identity_id: str, marks: set[str]) -> Iterator[str]:
    """Write a shared file again without what is about the person, or remove it where nothing else is in it."""
    location = run.path(name)
    try:
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(storage.read_bytes(location)))
            keep = [not named(row, identity_id, marks) for row in table.to_pylist()]
            if not all(keep):
                buffer = io.BytesIO()
                pq.write_table(table.filter(pa.array(keep)), buffer)
                storage.write_bytes(location, buffer.getvalue())
                yield f"{name}: {len(keep) - sum(keep)} rows"
        elif name.endswith(".jsonl"):
            lines = storage.read_bytes(location).decode().splitlines()
            kept = [line for line in lines if not named(json.loads(line), identity_id, marks)]
            if len(kept) < len(lines):
                storage.write_bytes(location, "".join(f"{line}\n" for line in kept).encode())
                yield f"{name}: {len(lines) - len(kept)} rows"
        elif name.endswith(".json") and named(storage.read_json(location), identity_id, marks):
            yield from _remove(run, [name])
    except (StorageError, ValueError, pa.ArrowException):
        if run.has(name):  # else a driver replaced it meanwhile; the proof looks at the new one
            raise
