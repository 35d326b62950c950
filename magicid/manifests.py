"""Identity manifests: a folder of folders, JSON lines, CSV or Parquet on any fsspec URL -> rows, and those set aside.

A manifest that cannot be read as a whole is an error; a row that cannot be used is set aside and the others go on.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import posixpath
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from magicid.errors import ManifestError, StorageError
from magicid.schema import Rejected
from magicid.storage import join, list_files, open_fs, public_name, public_text, read_bytes, sha256_json

COLUMNS = ("id", "owner", "photos", "captions", "class_word", "consent", "priority", "deadline", "overrides")
OVERRIDE_PREFIX = "recipe."  # a column `recipe.hpo.beta` is one override

_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.IGNORECASE | re.ASCII)
_CLASS_WORD = re.compile(r"[^\W\d_][\w' -]{0,39}")
_PHOTO_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic")
_DEFAULT_OWNER = "default"
_LONGEST_CAPTION = 1000  # characters


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One person as the manifest names them; `photos` are full locations, `overrides` dotted recipe keys -> TOML.

    `captions` say what each photo shows, in its order, empty where that is not said; or there are none.
    """

    id: str
    photos: list[str]
    owner: str = _DEFAULT_OWNER
    class_word: str = "person"
    consent: str | None = None
    priority: int = 0
    overrides: dict[str, str] = field(default_factory=dict)
    deadline: float | None = None  # Unix seconds
    captions: list[str] = field(default_factory=list)


def read_manifest(location: str) -> tuple[list[ManifestRow], list[Rejected]]:
    """Read a manifest: usable rows in its order, and the rows set aside.

    Columns: id and photos (a list; in CSV separated by ";"; relative to the manifest), and where wanted captions (what
    each photo shows, as many as photos), owner, class_word, consent, priority (higher is earlier), deadline (ISO 8601)
    and overrides (a mapping, or columns `recipe.<dotted key>`).
    A folder is read through the one `manifest.jsonl`, `.csv` or `.parquet` in it; without one, each folder in it is a
    person named like the folder.

    Raises:
        ManifestError: nothing there, another format, a column that is unknown (the nearest known one is named) or
            missing, or a truncated or unreadable file.
    """
    shown = public_name(location)
    if posixpath.splitext(str(location).rstrip("/"))[1].lower() in _READERS:
        records, base = _records(location), posixpath.dirname(str(location))
    else:
        try:
            files = list_files(location)
        except StorageError as error:
            raise ManifestError(f"cannot read the manifest: {error.problem}", error.action) from error
        found = [f for f in files if posixpath.basename(f) in _MANIFESTS and _relative(location, f).count("/") == 0]
        if len(found) > 1:
            names = ", ".join(posixpath.basename(f) for f in found)
            raise ManifestError(f"{shown} holds several manifests: {names}", "keep one, or name the file itself")
        if found:
            return read_manifest(found[0])
        records, base = _folders(location, files), str(location)
    if not records:
        raise ManifestError(f"{shown} names no identity", f"add one with {_COLUMN_HELP}")
    rows: dict[str, ManifestRow] = {}
    rejected = []
    for number, record in enumerate(records, start=1):
        try:
            row = _row(record, base)
            if row.id.lower() in rows:
                raise _RowError(
                    f"id {row.id!r} is there twice", "give each person an id of their own; the first is used"
                )
            rows[row.id.lower()] = row
        except _RowError as error:
            name = str(record.get("id") or f"row {number}").encode(errors="backslashreplace").decode()
            problem = f"{posixpath.basename(shown.rstrip('/'))} row {number}: {public_text(error.problem)}"
            rejected.append(Rejected("identity", name, problem, error.action))
    return list(rows.values()), rejected


def fingerprint(location: str) -> str:
    """Changes when the manifest does: of its file, or of the names of all files where it is a folder.

    Raises:
        ManifestError: nothing is there, or it cannot be reached.
    """
    try:
        if posixpath.splitext(str(location).rstrip("/"))[1].lower() in _READERS:
            fs, path = open_fs(location)
            return str(fs.ukey(path))
        files = list_files(location)
        named = [f for f in files if posixpath.basename(f) in _MANIFESTS]
        return sha256_json([files, [fingerprint(f) for f in named]])
    except (StorageError, OSError) as error:
        reason = error.problem if isinstance(error, StorageError) else public_text(str(error))
        raise ManifestError(f"cannot read the manifest: {reason}", "check the location") from error


class _RowError(ManifestError):
    """One row that cannot be used."""


# ---- formats -> records ------------------------------------------------------------------------------------------


def _records(location: str) -> list[dict[str, Any]]:
    """The rows of a manifest file as plain records of known columns."""
    try:
        data = read_bytes(location)
    except StorageError as error:
        raise ManifestError(f"cannot read the manifest: {error.problem}", error.action) from error
    ending = posixpath.splitext(location)[1].lower()
    shown = public_name(location)
    records = _READERS[ending](data, shown)
    columns = {column: None for record in records for column in record}
    for column in columns:
        if column not in COLUMNS and not column.startswith(OVERRIDE_PREFIX):
            near = difflib.get_close_matches(column, COLUMNS, 1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ManifestError(f"{shown} has an unknown column {column!r}", f"{hint}{_COLUMN_HELP}")
    for column in ("id", "photos"):
        if records and column not in columns:
            raise ManifestError(f"{shown} has no column {column!r}", _COLUMN_HELP)
    return records


_COLUMN_HELP = f"the columns are {', '.join(COLUMNS)} and {OVERRIDE_PREFIX}<key>; id and photos are needed"


def _read_jsonl(data: bytes, location: str) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(_text(data, location).splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ManifestError(
                    f"{location} line {number} is not JSON: {error}", "write one whole JSON object per line"
                ) from error
            if not isinstance(record, dict):
                raise ManifestError(f"{location} line {number} is not a JSON object", "write one JSON object per line")
            records.append(record)
    return records


def _read_csv(data: bytes, location: str) -> list[dict[str, Any]]:
    records = []
    reader = csv.DictReader(io.StringIO(_text(data, location)), restkey="", strict=True)
    try:
        for record in reader:
            if "" in record or None in record.values():
                raise ManifestError(
                    f"{location} line {reader.line_num} has another number of cells than the header",
                    "quote cells that hold commas",
                )
            records.append({key: value.strip() for key, value in record.items() if value.strip()})
    except csv.Error as error:
        raise ManifestError(f"{location} line {reader.line_num} is not CSV: {error}", "correct that line") from error
    for record in records:
        for column in reader.fieldnames or ():
            record.setdefault(column, None)
    return records


def _read_parquet(data: bytes, location: str) -> list[dict[str, Any]]:
    try:
        return list(pq.read_table(io.BytesIO(data)).to_pylist(maps_as_pydicts="strict"))
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{location} is not a whole Parquet file: {error}", "write it again") from error


def _text(data: bytes, location: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{location} is not UTF-8 text: {error}", "save it as UTF-8") from error


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
_MANIFESTS = {f"manifest{ending}" for ending in _READERS}


def _folders(location: str, files: list[str]) -> list[dict[str, Any]]:
    """One record per folder that holds photos."""
    photos: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = _relative(location, file).rpartition("/")
        if folder and name.lower().endswith(_PHOTO_ENDINGS) and not name.startswith("."):
            photos.setdefault(folder, []).append(file)
    if not photos:
        raise ManifestError(
            f"{public_name(location)} is neither a manifest ({', '.join(_READERS)}) nor a folder with a folder of "
            "photos per person",
            "check the location",
        )
    return [{"id": folder, "photos": found} for folder, found in sorted(photos.items())]


def _relative(location: str, file: str) -> str:
    """A listed file relative to the location it was listed from."""
    fs, root = open_fs(location)
    path = fs._strip_protocol(file)
    return str(path).removeprefix(str(root).rstrip("/")).lstrip("/")


# ---- record -> row -----------------------------------------------------------------------------------------------


def _row(record: dict[str, Any], base: str) -> ManifestRow:
    """A record as a row, its values checked. Raises _RowError."""
    identity = record.get("id")
    if not isinstance(identity, str) or not _ID.fullmatch(identity):
        raise _RowError(
            f"id {identity!r} cannot be used", "use 1 to 63 letters, digits, - and _, a letter or digit first"
        )
    class_word = record.get("class_word") or "person"
    if not isinstance(class_word, str) or not _CLASS_WORD.fullmatch(class_word):
        raise _RowError(f"class_word {class_word!r} is not a word", 'use a noun such as "person", "man" or "woman"')
    owner, consent = record.get("owner") or _DEFAULT_OWNER, record.get("consent") or None
    if not isinstance(owner, str) or not isinstance(consent, str | None):
        raise _RowError(f"owner {owner!r} or consent {consent!r} is not text", "write both as text")
    photos = _photos(record.get("photos"), base)
    row = ManifestRow(
        id=identity,
        photos=photos,
        owner=owner,
        class_word=class_word,
        consent=consent,
        priority=_priority(record.get("priority")),
        deadline=_deadline(record.get("deadline")),
        overrides=_overrides(record),
        captions=_captions(record.get("captions"), len(photos)),
    )
    try:  # JSON can spell half a character (a lone surrogate), which no table can hold
        "".join([owner, consent or "", *row.photos, *row.captions, *row.overrides, *row.overrides.values()]).encode()
    except UnicodeEncodeError as error:
        raise _RowError(
            f"a text of {identity!r} is not Unicode: {error.reason}", "write it in whole letters"
        ) from error
    return row


def _photos(value: Any, base: str) -> list[str]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(";") if part.strip()]
    if not isinstance(value, list) or not value or not all(isinstance(photo, str) and photo for photo in value):
        raise _RowError(f"photos {value!r} is not a list of paths", 'list the files; in CSV separated by ";"')
    return [photo if "://" in photo or photo.startswith("/") else join(base or ".", photo) for photo in value]


def _captions(value: Any, photos: int) -> list[str]:
    """As many captions as photos, empty for a photo that has none; or no captions at all."""
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, str):
        value = value.split(";")
    if not isinstance(value, list) or not all(isinstance(caption, str | None) for caption in value):
        raise _RowError(f"captions {value!r} is not a list of texts", 'list them; in CSV separated by ";"')
    if len(value) != photos:
        raise _RowError(f"there are {len(value)} captions of {photos} photos", 'write one for each, "" for none')
    captions = [(caption or "").strip() for caption in value]
    if longest := [caption for caption in captions if len(caption) > _LONGEST_CAPTION]:
        raise _RowError(
            f"the caption {longest[0][:24]!r}... has more than {_LONGEST_CAPTION} characters", "write a shorter one"
        )
    return captions


def _priority(value: Any) -> int:
    """A whole number that a table's 64-bit column can hold; 0 where there is none."""
    if value is None:
        return 0
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):  # OverflowError: Infinity
        number = None
    if number is None or isinstance(value, bool) or (not isinstance(value, str) and number != value):
        raise _RowError(f"priority {value!r} is not a whole number", "write one, such as 10")
    if not -(2**63) <= number < 2**63:
        raise _RowError(f"priority {str(value)[:24]}... has too many digits", "write a smaller one, such as 10")
    return number


def _deadline(value: Any) -> float | None:
    """Unix seconds of an ISO 8601 time; without a zone it is UTC. None where there is none."""
    if value is None or value == "":
        return None
    try:
        when = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise _RowError(f"deadline {value!r} is not a time", "write it like 2027-01-31T18:00:00+00:00") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _overrides(record: dict[str, Any]) -> dict[str, str]:
    given = record.get("overrides") or {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise _RowError(f"overrides {given!r} is not JSON: {error}", 'write {"hpo.beta": 500}') from error
    if not isinstance(given, dict):
        raise _RowError(f"overrides {given!r} is not a mapping", 'write {"hpo.beta": 500}')
    columns = {key.removeprefix(OVERRIDE_PREFIX): value for key, value in record.items() if key not in COLUMNS}
    # JSON numbers, booleans and lists are TOML as they stand; text stays text and is parsed with the recipe.
    overrides = {}
    for key, value in {**given, **columns}.items():
        if value is not None:
            try:
                overrides[str(key)] = value if isinstance(value, str) else json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise _RowError(f"the override {key!r} cannot be used: {error}", "write a number or a text") from error
    return overrides
