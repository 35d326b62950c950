"""Fifty people of three tenants through `ray job submit`, a machine lost on the way, and a status that is true."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magicid import adapters, ledger, status
from magicid.run import Run
from magicid.world.renderer import render_photos, sample_people
from tests.ray_jobs import job, nodes

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

TENANTS = {"north": 8, "south": 12, "west": 30}
LOST_AT = 10  # identities done when the machine goes
PHOTOS, END_S = 4, 4800
REDUCED = {
    "repository.trained_clips": 4, "repository.base_clips": 4, "sampling.steps": 3, "sft.steps": 8, "hpo.steps": 8,
    "hpo.batch_size": 2, "hpo.noise_draws": 2, "hpo.validate_every": 0, "trainer.checkpoint_every": 4,
    "evaluation.clips": 0, "selection.motion_tolerance": 9,
}  # fmt: skip


def write_people(folder: Path) -> Path:
    """A manifest of everybody, their photos drawn by the face world."""
    owners, rows = [name for name, count in TENANTS.items() for _ in range(count)], []
    looks = sample_people(len(owners), 4_500_000)
    for number, owner in enumerate(owners):
        places = []
        for photo, pixels in enumerate(render_photos(looks[number], PHOTOS, 4_500_000 + number)):
            file = folder / "photos" / f"{number:02d}-{photo}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(np.asarray(pixels)).save(file)
            places.append(str(file))
        rows.append({"id": f"{owner}-{number:02d}", "owner": owner, "photos": places, "consent": f"form-{number}"})
    manifest = folder / "people.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def test_fifty_people_survive_a_lost_machine(tmp_path: Path) -> None:
    out, run = tmp_path / "run", Run(str(tmp_path / "run"))
    options = [f"--{key}={value}" for key, value in REDUCED.items()] + ["--fleet.weights={west = 2}"]
    arguments = ["python", "-m", "ray_jobs.customize", "--recipe", "face-world"]
    arguments += ["--identities", str(write_people(tmp_path)), "--out", str(out), *options]
    here = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(job.ROOT)}
    cluster, began = nodes.Cluster(tmp_path, here, dashboard=True), time.monotonic()
    try:
        cluster.start()
        environment = {**cluster.environment, "RAY_ADDRESS": cluster.dashboard_url}

        def ray_job(*words: str) -> str:
            ray = Path(sys.executable).parent / "ray"
            done = subprocess.run([str(ray), "job", *words], env=environment, capture_output=True, text=True)
            return done.stdout + done.stderr

        while "submitted successfully" not in (
            said := ray_job("submit", "--no-wait", "--submission-id", "fifty", "--", *arguments)
        ):
            assert "No available agent" in said or "Failed to connect" in said, said
            time.sleep(2)

        def done() -> int:
            return status.read(run).states[ledger.DONE]

        def wait(until: int) -> None:
            while done() < until and status.read(run).driver.state == status.DRIVING:
                assert time.monotonic() - began < END_S, ray_job("logs", "fifty")[-3000:]
                time.sleep(5)

        while not (out / "ledger").exists():
            assert time.monotonic() - began < END_S, ray_job("logs", "fifty")[-3000:]
            time.sleep(1)
        wait(LOST_AT)
        at_loss = done()
        assert LOST_AT <= at_loss < sum(TENANTS.values()), ray_job("logs", "fifty")[-3000:]
        cluster.workers[0].kill()
        wait(10**9)
        while "RUNNING" in ray_job("status", "fifty"):  # its report is still to be written
            time.sleep(5)
        assert "succeeded" in ray_job("status", "fifty"), ray_job("logs", "fifty")[-3000:]
    finally:
        cluster.stop()
    print(f"lost a machine at {at_loss} done; {time.monotonic() - began:.0f} s in all")
    shown = subprocess.run(
        [sys.executable, "-m", "magicid.cli", "status", str(out)], cwd=job.ROOT, capture_output=True, text=True
    )
    print(shown.stdout)
    assert shown.returncode == 0, shown.stderr
    assert "ended   50 of 50 identities" in shown.stdout
    found = status.read(run)
    assert dict(found.states) == {ledger.DONE: 50}
    assert Counter(record.owner for record in found.records) == TENANTS
    for record in found.records:  # what it says is there, one version each, under its own tenant
        (version,) = adapters.list_versions(str(out), record.identity_id)
        assert version.version == record.adapter
        assert job.adapter_sha256(out, record.identity_id)
    assert found.driver.state == "ended"
