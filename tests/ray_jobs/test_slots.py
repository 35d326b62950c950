"""Slots of several workers: what meets one of them alone must not leave the others waiting for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from magicid import ledger
from magicid.run import Run
from tests.ray_jobs import job


@pytest.mark.timeout(1500)
def test_a_worker_that_loses_the_storage_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [str(photo) for photo in sorted((job.ROOT / "examples/identities/ada").iterdir())]
    row = {"id": "training-alone", "owner": "t", "photos": photos, "class_word": "person"}
    (tmp_path / "people.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("MAGICID_POISON", str(tmp_path))
    path = [str(Path(__file__).parent / "poison"), str(job.ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    arguments = job.command(
        tmp_path / "run", tmp_path / "people.jsonl", repository__trained_clips=4, repository__base_clips=4,
        sampling__steps=2, sft__steps=4, hpo__steps=4, hpo__validate_every=0, evaluation__clips=0,
        selection__still_pairs=0, trainer__zero_stage=2, resources__workers_per_slot=2,
    )  # fmt: skip
    # Gloo would wait half an hour for the missing worker: in ten minutes only a slot that ends at once gets through.
    assert job.finish(arguments, tmp_path / "log", timeout_s=600) == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "lost").exists(), "the second worker was there, and lost the storage"
    record = ledger.read(Run(str(tmp_path / "run")))["training-alone"]
    assert (record.state, record.problem) == (ledger.DONE, None)
    assert record.attempts == {"sft": 2, "hpo": 1}
    assert len(job.adapter_sha256(tmp_path / "run", "training-alone")) == 64
