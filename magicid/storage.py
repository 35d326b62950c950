"""Files on any fsspec URL: atomic writes, content addresses, and nothing half-written ever read.

A location is a local path or an fsspec URL (`s3://bucket/run`, `gs://...`, `memory://...`). Local writes go to a
temporary sibling and are renamed; object stores replace whole objects, so a reader sees the old bytes or the new ones.
No object is renamed: stores have no such thing. What passes by itself (throttling, 5xx, broken connections) is tried
again with growing pauses, beyond what s3fs and gcsfs do themselves; anything else is an error at once.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import tenacity
from fsspec.implementations.local import LocalFileSystem

from magicid import storage_errors
from magicid.errors import StorageError

_PROBE = ".magicid-write-probe"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> the optional dependency that brings it
# These know no folders: making one would ask for the right to make buckets.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "r2"})
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s<>\"]+")
# The user-info of a URL: up to the last @ of the host's part, or, where a password holds a slash, up to the first @.
_USER_INFO = re.compile(r"(://)(?:[^/?#]*@|[^/?#@:]*:(?!\d+(?:[/?#]|$))[^@]*@)")
_READ_ACTION = "check that the path exists and is readable"
_WRITE_ACTION = "check free space and write permission, or choose another --out"
_TRIES, _LONGEST_S = 5, 60  # no new try after that many seconds
_PAUSE_S = 0.5  # the first pause; each is twice the one before
_WRITER = "magicid-writer"  # metadata of an object: which call of `create_bytes` wrote it
# How each store names the metadata of a new object. Only these are known to create one exclusively.
_METADATA = {"s3": "Metadata", "s3a": "Metadata", "gs": "metadata", "gcs": "metadata", "memory": ""}
_ROWS_AT_ONCE = 8192  # of a table, as Python objects
_log = logging.getLogger(__name__)

T = TypeVar("T")


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces): the content address of settings."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def join(base: str | Path, *parts: str) -> str:
    """Join a location and relative parts with '/', for paths and URLs alike."""
    return posixpath.join(str(base).rstrip("/") or "/", *parts)


def public_name(location: str | Path) -> str:
    """A location as it may be shown and logged: a URL without user-info, query and fragment (keys, signatures)."""
    name = str(location)
    return re.split(r"[?#]", _USER_INFO.sub(r"\1", name))[0] if "://" in name else name


def public_text(text: str) -> str:
    """A text, such as another library's message, with every URL in it as `public_name` shows it."""

    def shown(found: re.Match[str]) -> str:
        url = found.group()
        bare = url.rstrip("'`)]},;:.")  # what the text puts around the URL
        return public_name(bare) + url[len(bare) :]

    return _URL.sub(shown, text)


@contextmanager
def _told(verb: str, location: str | Path, action: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a StorageError that names the location. Object stores raise many types."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = public_text(str(error)) or type(error).__name__
        problem = f"cannot {verb} {public_name(location)}: {reason}"
        raise StorageError(problem, storage_errors.next_action(error, action)) from error


def _call(verb: str, location: str | Path, action: str, do: Callable[[], T]) -> T:
    """Do it, again after a pause where the error is one that passes. Raises StorageError."""
    failed: list[Exception] = []

    def again() -> T:
        if failed:
            raise failed.pop()
        return do()

    with _told(verb, location, action):
        try:
            return do()  # nearly every call goes well, and tenacity costs more than a look at a disk
        except Exception as error:
            failed.append(error)
        return _retrying(verb, location)(again)


def _retrying(verb: str, location: str | Path) -> tenacity.Retrying:
    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _log.info("%s %s, try %d: %s", verb, public_name(location), state.attempt_number, public_text(str(error)))

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(storage_errors.transient),
        stop=tenacity.stop_after_attempt(_TRIES) | tenacity.stop_after_delay(_LONGEST_S),
        wait=tenacity.wait_exponential(multiplier=_PAUSE_S, max=8) + tenacity.wait_random(0, _PAUSE_S),
        before_sleep=say,
        reraise=True,
    )


def open_fs(location: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a location and the path in it.

    Raises:
        StorageError: an unknown protocol, one whose package is not installed, or one that cannot be set up.
    """
    protocol = str(location).split("://")[0].split("::")[-1]
    try:
        with _told("open", location, "check the location and the credentials of its storage"):
            # Object stores remember listings: what another process writes would not be seen.
            return fsspec.core.url_to_fs(str(location), use_listings_cache=False)
    except StorageError as error:
        if isinstance(error.__cause__, ImportError):
            extra = _EXTRAS.get(protocol)
            action = f'pip install "magicid[{extra}]"' if extra else "install the package it names"
            raise StorageError(error.problem, action) from error.__cause__
        if isinstance(error.__cause__, ValueError):
            raise StorageError(error.problem, "use a path, or a URL fsspec knows such as s3:// or gs://") from error
        raise


def exists(location: str | Path) -> bool:
    """Whether a file or folder is there. Raises StorageError when the storage does not say."""
    fs, path = open_fs(location)
    return _call("look for", location, _READ_ACTION, lambda: bool(fs.exists(path)))


def file_size(location: str | Path) -> int:
    """The size of a file in bytes; 0 where the storage does not know. Raises StorageError when it is missing."""
    fs, path = open_fs(location)
    return _call("read", location, _READ_ACTION, lambda: int(fs.size(path) or 0))


def read_bytes(location: str | Path, first: int | None = None) -> bytes:
    """The bytes of a file, or its `first` ones. Raises StorageError when it is missing or unreadable."""
    fs, path = open_fs(location)
    return _call("read", location, _READ_ACTION, lambda: bytes(fs.cat_file(path, end=first)))


def write_bytes(location: str | Path, data: bytes) -> str:
    """Write a file atomically; returns its SHA-256. Raises StorageError (unwritable, disk full)."""
    fs, path = open_fs(location)

    def write() -> None:
        if isinstance(fs, LocalFileSystem):
            with _temporary(path, data) as temporary:
                os.replace(temporary, path)
        else:
            _make_folder(fs, path)
            with _bucket_is_meant(fs, path):
                fs.pipe_file(path, data)

    _call("write", location, _WRITE_ACTION, write)
    return sha256_bytes(data)


def create_bytes(location: str | Path, data: bytes) -> bool:
    """Write a file only if none is there, atomically; False when it exists.

    Of any number of callers, on any machines, one gets True. On local disks by a hard link, on S3 by `If-None-Match`,
    on GCS by `ifGenerationMatch`. True also when the answer to a write that went well was lost on the way.

    Raises:
        StorageError: as `write_bytes`, or the storage cannot create exclusively.
    """
    fs, path = open_fs(location)
    if isinstance(fs, LocalFileSystem):
        return _call("write", location, _WRITE_ACTION, lambda: _create_local(path, data))
    keyword = next((_METADATA[name] for name in _protocols(fs) if name in _METADATA), None)
    if keyword is None:
        raise StorageError(
            f"cannot write {public_name(location)}: {_protocols(fs)[0]} is not known to create files exclusively",
            "use a local or shared disk, S3 or GCS",
        )
    writer = uuid.uuid4().hex

    def create() -> bool:
        _make_folder(fs, path)
        try:
            with _bucket_is_meant(fs, path):
                fs.pipe_file(path, data, mode="create", **({keyword: {_WRITER: writer}} if keyword else {}))
        except Exception as error:
            if not isinstance(error, FileExistsError) and storage_errors.code(error) != "PreconditionFailed":
                raise
            # It may be this very call's, written by a try whose answer was lost.
            return bool(keyword) and _metadata(fs, path, keyword).get(_WRITER) == writer
        return True

    return _call("write", location, _WRITE_ACTION, create)


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _make_folder(fs: fsspec.AbstractFileSystem, path: str) -> None:
    if _OBJECT_STORES.isdisjoint(_protocols(fs)):
        fs.makedirs(posixpath.dirname(path), exist_ok=True)


@contextmanager
def _bucket_is_meant(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[None]:
    """What is not found when an object is written is its bucket; GCS's answer does not say so."""
    try:
        yield
    except FileNotFoundError as error:
        if _OBJECT_STORES.isdisjoint(_protocols(fs)):
            raise
        raise storage_errors.NoSuchBucket(f"there is no bucket {path.split('/')[0]}") from error


def _metadata(fs: fsspec.AbstractFileSystem, path: str, keyword: str) -> dict[str, str]:
    """The metadata an object was written with."""
    return dict(fs.metadata(path) if keyword == "Metadata" else fs.info(path).get("metadata") or {})


@contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A sibling of `path` that holds the data, on disk; gone afterwards."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _create_local(path: str, data: bytes) -> bool:
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return os.stat(temporary).st_nlink > 1  # NFS may lose the answer to a link that it made
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            raise StorageError(
                f"cannot write {path}: its file system has no hard links, by which a file is created exclusively",
                "use another disk, NFS, S3 or GCS",
            ) from error
    return True


def check_writable(location: str | Path) -> None:
    """Write and remove a small probe. Raises StorageError when the location cannot be written."""
    probe = join(location, f"{_PROBE}-{uuid.uuid4().hex[:8]}")
    write_bytes(probe, b"probe")
    remove(probe)


def check_creates_once(location: str | Path) -> None:
    """See that the storage keeps `create_bytes`' promise, on a small probe: some stores ignore the condition.

    Raises:
        StorageError: it does not, or it cannot be written.
    """
    probe = join(location, f"{_PROBE}-{uuid.uuid4().hex[:8]}")
    once = create_bytes(probe, b"first") and not create_bytes(probe, b"second")
    remove(probe)
    if not once:
        raise StorageError(
            f"{public_name(location)} writes over a file that must only be created: two drivers could take one run",
            "use a storage with conditional writes (Amazon S3, GCS, a recent MinIO or Ceph), or a shared disk",
        )


def list_files(location: str | Path, suffix: str = "") -> list[str]:
    """Sorted full locations of the files below a folder (recursive) that end with `suffix`; [] when it is missing.

    Raises StorageError when the folder cannot be listed.
    """
    fs, path = open_fs(location)

    def find() -> list[str]:
        if not fs.exists(path):
            return []
        found = [f for f in fs.find(path) if f.endswith(suffix) and not f.endswith(".partial")]
        return sorted(found if isinstance(fs, LocalFileSystem) else [fs.unstrip_protocol(f) for f in found])

    return _call("list", location, "check that the folder is readable", find)


def list_relative(location: str | Path) -> list[str]:
    """Every file below a folder, relative to it, also what a write that was killed left behind; [] when it is missing.

    Raises StorageError when the folder cannot be listed.
    """
    fs, path = open_fs(location)

    def find() -> list[str]:
        found = fs.find(path) if fs.exists(path) else []
        return sorted(file[len(path.rstrip("/")) + 1 :] for file in found)

    return _call("list", location, "check that the folder is readable", find)


def list_folder(location: str | Path) -> tuple[list[str], list[str]]:
    """The names of the files and of the folders directly in a folder; none when it is missing. Raises StorageError."""
    fs, path = open_fs(location)

    def look() -> tuple[list[str], list[str]]:
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        names: dict[str, list[str]] = {"file": [], "directory": []}
        for entry in entries:
            if (name := entry["name"].rstrip("/")) != path.rstrip("/"):  # object stores may list the folder itself
                names[entry["type"] if entry["type"] == "directory" else "file"].append(name.rsplit("/", 1)[-1])
        return sorted(names["file"]), sorted(names["directory"])

    return _call("list", location, "check that the folder is readable", look)


def remove(location: str | Path) -> None:
    """Remove a file or a folder with all below it; nothing happens when it is missing.

    Raises StorageError when it cannot be removed.
    """
    fs, path = open_fs(location)

    def take_away() -> None:
        if fs.exists(path):
            try:
                fs.rm(path, recursive=True)
            except FileNotFoundError:
                if fs.exists(path):  # another process removes it too
                    raise

    _call("remove", location, "check the write permission, or remove it by hand", take_away)


def remove_partials(location: str | Path) -> None:
    """Remove what writers of a file that were killed have left beside it, on a local disk; the file itself stays.

    Raises StorageError when it cannot be removed.
    """
    fs, path = open_fs(location)
    if not isinstance(fs, LocalFileSystem):
        return
    pattern = os.path.join(glob.escape(os.path.dirname(path)), f".{glob.escape(os.path.basename(path))}.*.partial")
    for leftover in glob.glob(pattern):
        remove(leftover)


def write_json(location: str | Path, value: Any) -> str:
    """Write JSON (indented, sorted keys) atomically; returns its SHA-256."""
    return write_bytes(location, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(location: str | Path) -> Any:
    """Read JSON. Raises StorageError when it is missing or not JSON."""
    try:
        return json.loads(read_bytes(location))
    except ValueError as error:
        raise StorageError(f"{public_name(location)} is not valid JSON: {error}", "remove it and run again") from error


def write_table(location: str | Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> str:
    """Write rows as one Parquet file, atomically, in the given schema; returns its SHA-256.

    Rows may come from a generator: no more than a part of them is held as Python objects.
    """
    buffer, left = io.BytesIO(), iter(rows)
    with pq.ParquetWriter(buffer, schema) as writer:
        part = list(itertools.islice(left, _ROWS_AT_ONCE))
        while True:
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
            if not (part := list(itertools.islice(left, _ROWS_AT_ONCE))):
                break
    return write_bytes(location, buffer.getvalue())


def read_table(location: str | Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Read one Parquet file as rows, or some columns of it. Raises StorageError when it is missing or truncated."""
    return list(iter_table(location, columns))


def iter_table(location: str | Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of `read_table` one by one, for large tables that become something smaller."""
    data = read_bytes(location)
    try:
        for part in pq.ParquetFile(io.BytesIO(data)).iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield from part.to_pylist()
    except pa.ArrowException as error:
        raise StorageError(
            f"{public_name(location)} is not a whole Parquet file: {error}", "remove it and run again"
        ) from error


def write_arrays(location: str | Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> str:
    """Write named arrays as safetensors, atomically; returns the SHA-256 of the file."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return write_bytes(location, safetensors.numpy.save(contiguous, metadata=metadata))


def read_arrays(location: str | Path) -> dict[str, np.ndarray]:
    """Read a safetensors file as named arrays. Raises StorageError when it is missing or corrupt."""
    data = read_bytes(location)
    try:
        return dict(safetensors.numpy.load(data))
    except Exception as error:
        raise StorageError(
            f"{public_name(location)} is not a whole safetensors file: {error}", "remove it and run again"
        ) from error
