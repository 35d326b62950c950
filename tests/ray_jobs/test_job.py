"""The whole job on real Ray: what it leaves, what a bad input costs, and that kills change nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from magicid import storage
from magicid.run import Run
from magicid.schema import MetricRow, Rejected, ScoredClip
from tests.ray_jobs import job

EXAMPLES = job.ROOT / "examples" / "identities"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good person, and three who cannot be used."""
    folder = tmp_path_factory.mktemp("people")
    shutil.copytree(EXAMPLES / "ada", folder / "ada")
    (folder / "ada" / "99.png").write_text("this is no picture")
    (folder / "empty").mkdir()
    (folder / "empty" / "01.png").write_bytes(b"")
    rows = [
        {"id": "ada", "owner": "t", "photos": [f"ada/{p.name}" for p in sorted((folder / "ada").iterdir())]},
        {"id": "empty", "owner": "t", "photos": ["empty/01.png"]},
        {"id": "ada", "owner": "t", "photos": ["ada/01.png"]},
        {"id": "../escape", "owner": "t", "photos": ["ada/01.png"]},
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def finished(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted, submitted to a local cluster as the README says."""
    out = tmp_path_factory.mktemp("finished")
    with job.cluster(tmp_path_factory.mktemp("head")) as environment:
        refused = job.submit(["true"], {**environment, "RAY_AUTH_TOKEN": "0" * 32})
        assert refused.returncode != 0
        lost = job.submit(job.command(Path("runs/lost"), people), environment)
        assert lost.returncode != 0
        assert "would be lost" in lost.stdout
        done = job.submit(job.command(out, people), environment)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out


def test_the_good_identity_is_published_and_the_bad_ones_are_named(finished: Path) -> None:
    run = Run(str(finished))
    assert run.identity_ids() == ["ada"]
    reasons = {(r.kind, r.name): r.problem for r in run.read("rejected.parquet", Rejected)}
    assert ("identity", "empty") in reasons
    assert any(name == "../escape" for _, name in reasons)
    assert any("twice" in reason or "duplicate" in reason for reason in reasons.values())
    assert any("99.png" in reason for reason in reasons.values())
    assert job.adapter_sha256(finished, "ada")


def test_every_clip_has_its_rewards_or_a_reason(finished: Path) -> None:
    rows = Run(str(finished)).read_parts("scored", ScoredClip)
    assert sorted(row.kind for row in rows) == [*["V_id"] * 5, *["V_s"] * 8, *["V_still"] * 8, *["V_t"] * 8]
    for copy in (row for row in rows if row.kind == "V_still"):  # of them nothing is asked but that they are there
        assert (copy.error, copy.motion_reward, set(copy.seconds)) == (None, None, {"GenerateClips"})
        assert copy.source_id in {row.clip_id for row in rows if row.kind == "V_t"}
        assert storage.sha256_bytes(storage.read_bytes(finished / str(copy.video_uri))) == copy.video_sha256
    for row in (row for row in rows if row.kind != "V_still"):
        assert row.error is None
        assert set(row.seconds) == {"GenerateClips", "ScoreIdentity", "ScoreMotion", "ScoreSemantics"}
        assert storage.sha256_bytes(storage.read_bytes(finished / str(row.video_uri))) == row.video_sha256
        assert (row.embeddings is None) == (row.identity_error is not None)
        assert row.motion_reward is not None
        assert row.motion_reward >= 0
        assert row.semantics_reward is not None
        assert 1 <= row.semantics_reward <= 10
    moving = [row.motion_reward for row in rows if row.kind == "V_s" and row.motion_reward is not None]
    still = [row.motion_reward for row in rows if row.kind == "V_id" and row.motion_reward is not None]
    assert max(still) < sum(moving) / len(moving)


def test_the_table_has_every_method_on_the_same_prompts_and_seeds(finished: Path) -> None:
    rows = Run(str(finished)).read_parts("evaluation", MetricRow)
    asked = {method: {(r.prompt, r.seed) for r in rows if r.method == method} for method in ("base", "sft", "hpo")}
    assert len(asked["base"]) == 2
    assert asked["base"] == asked["sft"] == asked["hpo"]


def test_the_report_is_one_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "ada" in page
    assert "data:video/mp4;base64," in page


def test_a_second_start_changes_nothing(finished: Path, people: Path) -> None:
    before, adapter = job.clips(finished), job.adapter_sha256(finished, "ada")
    log = finished.parent / "again.log"
    assert job.finish(job.command(finished, people), log) == 0, log.read_text()[-3000:]
    assert job.clips(finished) == before
    assert job.adapter_sha256(finished, "ada") == adapter


def test_kills_of_driver_and_worker_change_nothing(finished: Path, people: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = job.command(out, people)

    process = job.start(arguments, log)  # kill -9 of the driver in the middle of generation
    job.wait_for(lambda: len(job.clips(out)) >= 4, process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = job.clips(out)
    assert not (out / "pairs").exists()

    process = job.start(arguments, log)  # kill -9 of the training worker, then of the driver, in the middle of HPO
    checkpoints = out / "training" / "ada" / "hpo" / "checkpoints"
    job.wait_for(lambda: any(checkpoints.glob("hpo-*.safetensors")), process, log)
    workers = [pid for pid, name in job.session_processes(process).items() if "RayTrainWorker" in name]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    job.wait_for(
        lambda: any(checkpoints.glob("hpo-0000000[6-9]*")) or any(checkpoints.glob("hpo-00000012*")), process, log
    )
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    assert job.finish(arguments, log) == 0, log.read_text()[-3000:]
    now = job.clips(out)
    assert {name: now[name] for name in made} == made, "a finished clip was made again"
    assert job.latents(out) == job.latents(finished), "a clip of the repository came out otherwise"
    assert job.sft_sha256(out, "ada") == job.sft_sha256(finished, "ada")
    assert now.keys() == job.clips(finished).keys()
    assert job.pair_ids(out, "ada") == job.pair_ids(finished, "ada")
    assert job.adapter_sha256(out, "ada") == job.adapter_sha256(finished, "ada")


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"id": "x", "owner": "t", "photos": ["missing.png"]}) + "\n")
    log = tmp_path / "log"
    assert job.finish(job.command(tmp_path / "run", manifest), log) == 2
    assert "no identity" in log.read_text()
