"""Rows that raise, hang, end their process or allocate without end, in each stage: stopped at the cap, others done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from magicid import ledger, status
from magicid.ledger import Record
from magicid.run import Run
from magicid.schema import ScoredClip
from ray_jobs.pipeline import best, failure
from tests.ray_jobs import job

WAYS = ("raise", "hang", "exit", "allocate")
DIED = "the process died"  # nobody comes back to say more
REASONS = {"raise": "poison in {stage}", "hang": DIED, "exit": DIED, "allocate": "MemoryError"}
CAP = 2

pytestmark = pytest.mark.soak  # seventeen people, sixteen of whom hang, die or fill memory: minutes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A good person, and one for each stage and way; photos are ada's, but each has a class word of her own."""
    folder = tmp_path_factory.mktemp("poison")
    photos = [str(photo) for photo in sorted((job.ROOT / "examples/identities/ada").iterdir())]
    names = ["good", *(f"{stage}-{way}" for stage in ("generation", "reward", "photos", "training") for way in WAYS)]
    rows = [{"id": name, "owner": "t", "photos": photos, "class_word": "person"} for name in names]
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = job.command(
        folder / "run", folder / "people.jsonl",
        repository__trained_clips=4, repository__base_clips=4, repository__attempts=CAP, sampling__steps=2,
        sft__steps=4, hpo__steps=4, hpo__validate_every=0, evaluation__clips=0, selection__still_pairs=0, sft__moving=0,
        resources__max_failures=CAP - 1,
        fleet__clip_limit_s=15, fleet__step_limit_s=30, fleet__memory_limit_gib=1, fleet__window=len(names),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAGICID_POISON", str(folder))
        path = [str(Path(__file__).parent / "poison"), str(job.ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        code = job.finish(arguments, folder / "log", timeout_s=1500)
    assert code == 0, (folder / "log").read_text()[-3000:]
    return Run(str(folder / "run"))


@pytest.fixture(scope="module")
def records(run: Run) -> dict[str, Record]:
    return ledger.read(run)


@pytest.mark.timeout(1800)
def test_all_else_is_done(run: Run, records: dict[str, Record]) -> None:
    done = {name for name, record in records.items() if record.state == ledger.DONE}
    assert done == {"good", *(f"{stage}-{way}" for stage in ("generation", "reward") for way in WAYS)}
    assert status.read(run).driver.state == "ended"
    assert all(job.adapter_sha256(Path(run.location), name) for name in done)
    assert (records["good"].failed_clips, records["good"].problem) == (0, None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", ["generation", "reward"])
def test_a_poisoned_clip_is_given_up_with_its_reason(
    run: Run, records: dict[str, Record], stage: str, way: str
) -> None:
    name = f"{stage}-{way}"
    clips = best(run.read_parts(f"scored/{name}", ScoredClip)).values()
    (bad,) = [clip for clip in clips if failure(clip)]
    assert len(clips) == 5 + 4
    assert REASONS[way].format(stage=stage) in str(bad.error if stage == "generation" else bad.motion_error)
    assert (bad.video_uri is None) == (stage == "generation")
    assert records[name].failed_clips == 1
    assert REASONS[way].format(stage=stage) in str(records[name].problem)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", ["photos", "training"])
def test_a_poisoned_person_is_given_up_with_the_reason(records: dict[str, Record], stage: str, way: str) -> None:
    record = records[f"{stage}-{way}"]
    assert record.state == ledger.FAILED
    assert record.stage == {"photos": "check", "training": "sft"}[stage]
    assert record.problem is not None
    assert record.action
    assert REASONS[way].format(stage=stage) in record.problem or (stage, way) in (
        ("training", "hang"),
        ("training", "exit"),
    )
    if stage == "training":
        assert record.attempts["sft"] == CAP
        assert "\n" not in record.problem
