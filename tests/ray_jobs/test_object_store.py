"""The whole job with its photos, its manifest and its run directory in an object store."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from magicid import adapters, storage
from magicid.errors import StorageError
from magicid.run import Run
from magicid.schema import ScoredClip
from tests.object_store import BUCKET, s3_server
from tests.ray_jobs import job


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3") / "log") as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


def test_what_another_process_writes_is_seen(bucket: str) -> None:
    folder = f"{bucket}/seen"
    storage.write_bytes(f"{folder}/a", b"1")
    assert storage.list_files(folder) == [f"{folder}/a"]
    assert not storage.exists(f"{folder}/b")
    pid = os.posix_spawn(
        (python := job.command(Path("x"), Path("y"))[0]),
        [python, "-c", f"from magicid import storage; storage.write_bytes('{folder}/b', b'2')"],
        dict(os.environ),
    )
    assert os.waitpid(pid, 0)[1] == 0
    assert storage.exists(f"{folder}/b")
    assert storage.list_files(folder) == [f"{folder}/a", f"{folder}/b"]


def test_a_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(StorageError, match="cannot write s3://no-such-bucket/run"):
        storage.check_writable("s3://no-such-bucket/run")


def test_the_job_runs_in_a_bucket_and_goes_on_there(bucket: str, tmp_path: Path) -> None:
    for photo in sorted((job.ROOT / "examples/identities/ada").iterdir()):
        storage.write_bytes(f"{bucket}/photos/ada/{photo.name}", photo.read_bytes())
    photos = [name.removeprefix(f"{bucket}/photos/") for name in storage.list_files(f"{bucket}/photos")]
    captions = ["a {class_word} in the snow", "", *("a {class_word} in the kitchen" for _ in photos[2:])]
    row = {"id": "ada", "owner": "t", "photos": photos, "captions": captions}
    storage.write_bytes(f"{bucket}/photos/manifest.jsonl", (json.dumps(row) + "\n").encode())
    out, log = f"{bucket}/run", tmp_path / "log"
    arguments = job.command(Path("OUT"), Path("PEOPLE"), sft__moving=2)
    arguments[arguments.index("OUT")], arguments[arguments.index("PEOPLE")] = out, f"{bucket}/photos/manifest.jsonl"

    assert job.finish(arguments, log) == 0, log.read_text()[-3000:]
    (published,) = adapters.list_versions(out, "ada")
    assert adapters.verify(published.location)["identity_id"] == "ada"
    assert storage.read_bytes(f"{out}/report.html").startswith(b"<!")
    rows = Run(out).read_parts("scored", ScoredClip)
    still, moving = len(photos), 2 * len(photos)
    assert Counter(row.kind for row in rows) == {"V_s": 8, "V_t": 8, "V_still": 8, "V_id": still, "V_mov": moving}
    assert Counter(row.prompt for row in rows if row.kind == "V_id") == {
        "a person in the snow": 1, "a person": 1, "a person in the kitchen": still - 2,
    }  # fmt: skip
    for copy in (row for row in rows if row.kind == "V_mov"):  # nothing is asked of it but that it is there
        assert (copy.prompt, copy.motion_reward, set(copy.seconds)) == ("a person", None, {"GenerateClips"})
    assert all(row.text_uri == f"text/{row.clip_id}.safetensors" for row in rows if row.kind == "V_id"), (
        "a text of its own"
    )
    assert all(row.error is None for row in rows)
    assert "test-secret" not in log.read_text()

    # One clip lost, and the end of the job undone: started again, it makes that much and nothing else.
    before = storage.list_files(out)
    assert not [name for name in before if "partial" in name]
    storage.remove(published.location)
    assert job.finish(arguments, log) == 0, log.read_text()[-3000:]
    assert adapters.list_versions(out, "ada") == [published]
    assert {row.clip_id for row in Run(out).read_parts("scored", ScoredClip)} == {row.clip_id for row in rows}
