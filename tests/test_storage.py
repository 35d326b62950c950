"""Storage: writes are whole or absent, damage is named, fsspec URLs work like paths."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from magicid import recipe, storage, storage_errors
from magicid.errors import StorageError
from magicid.run import Run

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of b"abc", FIPS 180-2


@pytest.fixture(params=["file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "file" else f"memory://{request.node.name}"


def test_bytes_json_arrays_and_tables_come_back(location: str) -> None:
    assert storage.write_bytes(f"{location}/x/a.bin", b"abc") == ABC
    assert storage.read_bytes(f"{location}/x/a.bin") == b"abc"
    storage.write_json(f"{location}/x/b.json", {"k": [1, None]})
    assert storage.read_json(f"{location}/x/b.json") == {"k": [1, None]}
    storage.write_arrays(f"{location}/c.safetensors", {"v": np.arange(3.0)})
    assert storage.read_arrays(f"{location}/c.safetensors")["v"].tolist() == [0.0, 1.0, 2.0]
    storage.write_table(f"{location}/d.parquet", [{"n": 1}, {"n": None}], pa.schema([("n", pa.int64())]))
    assert storage.read_table(f"{location}/d.parquet") == [{"n": 1}, {"n": None}]
    names = [os.path.basename(name) for name in storage.list_files(location)]
    assert names == ["c.safetensors", "d.parquet", "a.bin", "b.json"]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.bin"
    storage.write_bytes(target, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*free some space or raise the quota"):
        storage.write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("reader", [storage.read_table, storage.read_arrays, storage.read_json])
def test_a_damaged_file_is_named(reader: object, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"PAR1 half a fi")
    with pytest.raises(StorageError, match="damaged"):
        reader(damaged)  # type: ignore[operator]


def test_a_run_refuses_another_recipe(tmp_path: Path) -> None:
    run, plain = Run(str(tmp_path)), recipe.load("face-world")
    run.open(plain, "base")
    run.open(plain, "base")
    with pytest.raises(StorageError, match="begun with another recipe"):
        run.open(plain.with_overrides({"hpo.beta": 3}), "base")
    with pytest.raises(StorageError, match="begun with base model"):
        run.open(plain, "other")


def test_a_run_begun_before_a_key_was_known_goes_on_with_the_keys_default(tmp_path: Path) -> None:
    run, plain = Run(str(tmp_path)), recipe.load("face-world")
    run.open(plain, "base")
    lines = (tmp_path / "recipe.toml").read_text().splitlines(keepends=True)
    (tmp_path / "recipe.toml").write_text("".join(line for line in lines if line != "every = 0\n"))
    storage.write_json(run.path("run.json"), {**storage.read_json(run.path("run.json")), "recipe_sha256": "of then"})
    run.open(plain, "base")
    assert run.recipe() == plain
    with pytest.raises(StorageError, match="begun with another recipe"):
        run.open(plain.with_overrides({"hpo.beta": 3}), "base")
    (tmp_path / "recipe.toml").write_text("gone = 1")  # a key that is known no longer
    with pytest.raises(StorageError, match="begun with another recipe"):
        run.open(plain, "base")


def test_an_unwritable_location_is_an_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        Run(str(blocker / "run")).open(recipe.load("face-world"), "base")


EVERY_CALL = [
    storage.exists,
    storage.file_size,
    storage.read_bytes,
    storage.list_files,
    storage.remove,
    storage.check_writable,
    lambda location: storage.write_bytes(location, b""),
]


@pytest.mark.parametrize("call", EVERY_CALL)
def test_storage_that_cannot_be_opened_says_what_to_do(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"cannot open nosuch://u/x.*Protocol not known"):
        call("nosuch://u/x")

    def without_packages(url: str, **options: object) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without_packages)
    for url, action in (("s3://b/x", "magicid[s3]"), ("gs://b/x", "magicid[gcs]"), ("abfs://b/x", "package it names")):
        with pytest.raises(StorageError) as caught:
            call(url)
        assert action in caught.value.action


class Refusing(fsspec.AbstractFileSystem):
    """An object store that gives no rights, and says so with a signed address."""

    protocol = "s3"

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise PermissionError("403, url='https://u:p@b.example/x?X-Amz-Signature=5ec2e7'")

    exists = find = rm = cat_file = pipe_file = size = _refuse


@pytest.mark.parametrize("call", EVERY_CALL)
def test_storage_that_refuses_is_a_clean_error_without_secrets(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (Refusing(), "b/x"))
    shown = r"https://b\.example/x(/\S+)?: 403, url='https://b\.example/x' — "  # the probe has a name of its own
    with pytest.raises(StorageError, match=shown) as caught:
        call("https://key:pass@b.example/x")
    assert "pass" not in str(caught.value)
    assert "5ec2e7" not in str(caught.value)


def test_object_stores_are_asked_for_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {}

    class Store(fsspec.AbstractFileSystem):
        protocol = ("s3", "s3a")

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            raise PermissionError("CreateBucket")

        def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
            written[path] = value

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (Store(), "b/x/y"))
    assert storage.write_bytes("s3://b/x/y", b"abc") == ABC
    assert written == {"b/x/y": b"abc"}


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/runs/a?b@c", "/runs/a?b@c"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("https://h.example/x.png?X-Amz-Signature=ab/c&e=u@v", "https://h.example/x.png"),
        ("https://h.example:8080/x?e=u@v", "https://h.example:8080/x"),
        ("https://user:p@ss@h.example:80/2@x.png#f", "https://h.example:80/2@x.png"),
        ("s3://KEY:se/cret@bucket/2@x.png", "s3://bucket/2@x.png"),
        ("simplecache::https://u:p@h/x?t=1", "simplecache::https://h/x"),
    ],
)
def test_a_shown_location_holds_no_secret(location: str, shown: str) -> None:
    assert storage.public_name(location) == shown
    assert storage.public_text(f"cannot read ('{location}'): no") == f"cannot read ('{shown}'): no"


def test_an_outage_is_told_from_a_file_that_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row may be blamed for, and what not."""
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for location in (broken, tmp_path / "missing.json"):
        with pytest.raises(StorageError) as bad:
            storage.read_json(location)
        assert not storage_errors.outage(bad.value)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):

        def refuse(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(StorageError) as full:
                storage.write_bytes(tmp_path / "x", b"")
        assert storage_errors.outage(full.value)
    assert storage_errors.outage(ConnectionResetError("reset"))
    assert not storage_errors.outage(ValueError("a clip of no frames"))
