"""One run is one job, however often it is submitted; on a real head, behind a token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from magicid import lease, storage
from magicid.errors import StorageError
from magicid.run import Run
from ray_jobs.submit import entrypoint, location, submission_id
from tests.ray_jobs import job


def test_ids_are_safe_readable_and_one_for_each_location() -> None:
    assert submission_id("s3://bucket/run-1") == submission_id("s3://bucket/run-1/")
    locations = ["s3://bucket/run-1", "s3://other/run-1", "/data/run 1", "/data/run_1", "gs://b/" + "x" * 300, "///"]
    ids = [submission_id(each) for each in locations]
    assert len(set(ids)) == len(ids)
    assert ids[0].startswith("run-1-")
    assert all(set(each) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") and len(each) < 60 for each in ids)


def test_a_relative_run_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(StorageError, match="is relative"):
        location("runs/x")
    assert location("/data/x/") == "/data/x"


def test_words_with_spaces_stay_words() -> None:
    command = entrypoint("face-world", "/my people", "/data/x", ['--prompts.name="a b"'])
    assert "'/my people'" in command
    assert """'--prompts.name="a b"'""" in command


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with job.cluster(tmp_path_factory.mktemp("head")) as found:
        yield found


def submit(environment: dict[str, str], people: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_jobs.submit", "--working-dir", ".", "--identities", str(people)]
    return subprocess.run(
        [*command, "--out", str(out), *more], cwd=job.ROOT, env={**environment, "COLUMNS": "300"}, timeout=900,
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_double_submit_is_one_run_and_an_ended_one_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    people, out = tmp_path / "people.jsonl", tmp_path / "my run"
    people.write_text(json.dumps({"id": "x", "owner": "t", "photos": ["missing.png"]}) + "\n")
    name = submission_id(str(out))

    first = submit(environment, people, out, "--no-wait")
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"submitted {name}" in first.stdout
    again = submit(environment, people, out, "--hpo.steps=7")
    assert f"{name} is pending already" in again.stdout or f"{name} is running already" in again.stdout
    assert "another command" in again.stdout
    assert again.returncode == 1  # there is nobody to customise, and the follower tells how it ended
    assert "no identity of" in again.stdout
    assert f"{name} failed" in again.stdout

    resumed = submit(environment, people, out)
    assert resumed.returncode == 1
    assert "was submitted before and has ended (failed); it goes on where it stood" in resumed.stdout
    assert f"submitted {name}" in resumed.stdout
    drivers = storage.list_files(f"{out}/driver", ".json")
    assert [file.rsplit("/", 1)[1] for file in drivers if "lease" in file] == [
        "lease-00000001.json", "lease-00000002.json",
    ]  # fmt: skip
    found = lease.newest(Run(str(out)))
    assert found is not None
    assert found["submission"] == name


def test_errors_are_told_in_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    people = tmp_path / "people.jsonl"
    wrong = submit({**environment, "RAY_AUTH_TOKEN": "0" * 32}, people, tmp_path / "run")
    assert wrong.returncode == 2
    assert "RAY_AUTH_TOKEN" in wrong.stdout
    (port,) = job.free_ports(1)
    nobody = submit(environment, people, tmp_path / "run", "--address", f"http://127.0.0.1:{port}")
    assert nobody.returncode == 2
    assert "no Ray cluster takes jobs at" in nobody.stdout
    key = submit(environment, people, tmp_path / "run", "--hpo.stpes=7")
    assert key.returncode == 2
    assert "hpo.steps" in key.stdout
