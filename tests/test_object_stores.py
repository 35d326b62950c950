"""Storage on every kind of store, with real servers: exclusive creation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from magicid import storage
from magicid.errors import StorageError
from tests.object_store import gcs_bucket, s3_bucket

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        yield {
            "file": str(tmp_path_factory.mktemp("local")),
            "memory": "memory://stores",
            "s3": stack.enter_context(s3_bucket(tmp_path_factory.mktemp("s3") / "log")),
            "gs": stack.enter_context(gcs_bucket()),
        }


@pytest.fixture(params=["file", "memory", "s3", "gs"])
def store(request: pytest.FixtureRequest, stores: dict[str, str]) -> str:
    return stores[request.param]


def test_a_file_is_created_once(store: str) -> None:
    place = f"{store}/lease/000001.json"
    assert storage.create_bytes(place, b"first") is True
    assert storage.create_bytes(place, b"second") is False
    assert storage.create_bytes(place, b"first") is False  # nor the one who comes with the same words
    assert storage.read_bytes(place) == b"first"
    assert storage.list_files(f"{store}/lease") == [place.replace("memory://", "memory:///")]
    storage.remove(place)
    assert storage.create_bytes(place, b"third") is True
    assert storage.read_bytes(place) == b"third"


RACER = """
import sys
from magicid import storage
won = 0
for number in range(25):
    won += storage.create_bytes(f"{sys.argv[1]}/race/{number}", sys.argv[2].encode() * 50_000)
print(won)
"""


@pytest.mark.parametrize("kind", ["file", "gs"])  # moto itself looks and writes in two steps
def test_of_several_processes_one_creates(kind: str, stores: dict[str, str]) -> None:
    arguments = [sys.executable, "-c", RACER, stores[kind]]
    racers = [
        subprocess.Popen([*arguments, name], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for name in "abc"
    ]
    assert sum(int(racer.communicate(timeout=120)[0]) for racer in racers) == 25
    for number in range(25):
        data = storage.read_bytes(f"{stores[kind]}/race/{number}")
        assert len(data) == 50_000
        assert len(set(data)) == 1


def test_a_create_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*free some space or raise the quota"):
        storage.create_bytes(tmp_path / "lease", b"x")
    assert os.listdir(tmp_path) == []


def test_a_store_that_ignores_the_condition_is_found_out(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check_creates_once(f"{store}/probe")
    assert storage.list_files(f"{store}/probe") == []
    if store.startswith(("s3:", "gs:")):
        fs, _ = storage.open_fs(store)  # kept by fsspec: every later call gets the same
        plain = fs.pipe_file

        def ignoring(path: str, data: bytes, mode: str = "", **options: Any) -> Any:
            return plain(path, data, **options)

        monkeypatch.setattr(fs, "pipe_file", ignoring)
        with pytest.raises(StorageError, match=r"two drivers could take one run — use a storage with conditional"):
            storage.check_creates_once(f"{store}/probe")
        assert storage.list_files(f"{store}/probe") == []


def test_a_store_that_cannot_create_exclusively_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="not known to create files exclusively"):
        storage.create_bytes("http://127.0.0.1:1/x", b"")

    def link(*_: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="has no hard links"):
        storage.create_bytes(tmp_path / "lease", b"x")
    assert os.listdir(tmp_path) == []
