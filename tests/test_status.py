"""What a status says of a run, from its files alone."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path

import pytest
from rich.console import Console

from magicid import lease, ledger, status, status_view, storage
from magicid.errors import StorageError
from magicid.ledger import Ledger
from magicid.run import Run

NOW = 1_800_000_000.0


def write_lease(run: Run, *, state: str = "driving", heard_s: float = 3.0, began_s: float = 1000.0) -> None:
    """A lease of this very process, begun and heard of so many seconds ago."""
    content = {
        "fence": 7,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": NOW - began_s,
        "submission": "s-1",
    }
    storage.write_json(run.path("driver", "lease-00000007.json"), content)
    beat = {"state": state, "number": 5, "at": NOW - heard_s, "lease_s": 60}
    storage.write_json(run.path("driver", "beat-00000007.json"), beat)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Four people of two tenants, one in each state but cancelled, and a driver that is at work."""
    run = Run(str(tmp_path / "run"))
    book = Ledger(run, 7, every_s=0)
    at = NOW - 900
    book.update(
        "ada", owner="a", state=ledger.DONE, stage="publish", arrived=at, began=at, ended=NOW - 100, adapter="v"
    )
    book.update("ada", seconds={"sft": 40.0, "hpo": 60.0, "GenerateClips": 25.0}, attempts={"sft": 1.0, "hpo": 2.0})
    book.update("bo", owner="a", state=ledger.RUNNING, stage="hpo", done=50, total=100, arrived=at, began=NOW - 300)
    book.update("bo", seconds={"sft": 30.0}, attempts={"sft": 1.0})
    book.update("cy", owner="b", arrived=NOW - 600)
    book.update(
        "di", owner="b", state=ledger.FAILED, stage="sft", problem="out of luck", action="toss again", ended=NOW
    )
    book.update("di", attempts={"sft": 4.0}, failed_clips=2, arrived=at)
    book.close()
    write_lease(run)
    return run


def test_counts_progress_cost_and_failures(run: Run) -> None:
    found = status.read(run, NOW)
    assert (found.driver.state, found.driver.host, found.driver.fence) == ("running", socket.gethostname(), 7)
    assert "heard of 3 s ago" in str(found.driver)
    assert found.states == {"done": 1, "running": 1, "waiting": 1, "failed": 1}
    assert {t.owner: dict(t.states) for t in found.tenants} == {
        "a": {"done": 1, "running": 1}, "b": {"waiting": 1, "failed": 1},
    }  # fmt: skip
    assert found.stages == {"hpo": 1}
    assert {t.owner: t.oldest_wait_s for t in found.tenants} == {"a": None, "b": 600.0}
    assert found.seconds == {"sft": 70.0, "hpo": 60.0, "GenerateClips": 25.0}
    assert found.attempts == 8
    assert [(r.identity_id, r.problem, r.action) for r in found.failed] == [("di", "out of luck", "toss again")]


def test_time_left_is_the_rest_at_this_drivers_pace(run: Run) -> None:
    # In 1000 s: ada and di ended, bo is at 6.5 of 9 stages. Left are cy, and 2.5 stages of bo.
    part = 6.5 / 9
    assert status.read(run, NOW).left_s == pytest.approx((2 - part) * 1000 / (2 + part))
    write_lease(run, began_s=50)  # a driver that has just begun has no pace yet
    assert status.read(run, NOW).left_s is None
    write_lease(run, began_s=90)  # what others did before it is no pace of its own: in 90 s it saw di fail
    assert status.read(run, NOW).left_s == pytest.approx((2 - part) * 90 / 1)


@pytest.mark.parametrize(
    ("lease", "state", "said"),
    [
        ({"heard_s": 61.0}, "lost", "submit the job again"),
        ({"state": "released", "heard_s": 10.0}, "stopped", "stopped 10 s ago"),
    ],
)
def test_a_driver_that_is_gone_does_not_run(run: Run, lease: dict[str, object], state: str, said: str) -> None:
    write_lease(run, **lease)  # type: ignore[arg-type]
    found = status.read(run, NOW)
    assert found.driver.state == state
    assert said in str(found.driver)
    assert found.states["running"] == 0
    assert found.states["interrupted"] == 1
    assert found.left_s is None


def test_a_driver_whose_process_is_gone_is_lost_at_once(run: Run) -> None:
    location = run.path("driver", "lease-00000007.json")
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    storage.write_json(location, {**storage.read_json(location), **lease._processes(), "pid": child})
    assert status.read(run, NOW).driver.state == "lost"


def test_a_run_that_ended(run: Run) -> None:
    book = Ledger(run, 7, every_s=0)
    for name in ("bo", "cy"):
        book.update(name, state=ledger.CANCELLED, ended=NOW)
    book.close()
    write_lease(run, state="released", heard_s=5)
    assert status.read(run, NOW).driver.state == "ended"


def test_no_run_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"holds no run.*give the --out"):
        status.read(Run(str(tmp_path)))
    storage.write_json(str(tmp_path / "run.json"), {})
    found = status.read(Run(str(tmp_path)))
    assert (str(found.driver), found.records, found.left_s) == ("never started", [], None)


def test_json_is_complete_and_stable(run: Run) -> None:
    found = json.loads(json.dumps(status.to_json(status.read(run, NOW))))
    assert list(found) == [
        "format", "run", "at", "driver", "states", "stages", "tenants", "device_seconds", "device_seconds_total",
        "left_s", "attempts", "under_way", "failed",
    ]  # fmt: skip
    assert found["format"] == 1
    assert found["driver"] == {
        "state": "running", "host": socket.gethostname(), "pid": os.getpid(), "start": 7, "began": NOW - 1000,
        "heard_s": 3.0, "submission": "s-1",
    }  # fmt: skip
    assert found["states"] == {"waiting": 1, "running": 1, "interrupted": 0, "done": 1, "failed": 1, "cancelled": 0}
    assert list(found["stages"]) == list(ledger.STAGES)
    assert found["device_seconds_total"] == 155.0
    assert found["under_way"] == [
        {"identity": "bo", "owner": "a", "stage": "hpo", "done": 50.0, "total": 100.0, "began": NOW - 300}
    ]
    (failed,) = found["failed"]
    assert failed == {
        "identity": "di", "owner": "b", "stage": "sft", "problem": "out of luck", "action": "toss again",
        "attempts": {"sft": 4.0}, "failed_clips": 2, "ended": NOW,
    }  # fmt: skip
    (_, b) = found["tenants"]
    assert (b["owner"], b["states"]["waiting"], b["oldest_wait_s"], b["device_seconds"]) == ("b", 1, 600.0, {})


def drawn(found: status.Status) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(status_view.render(found))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_view_shows_what_matters(run: Run) -> None:
    text = drawn(status.read(run, NOW))
    for part in (
        "running on",
        "2 of 4 identities",
        "left about",
        "hpo",
        "50 of 100",
        "5 min",
        "out of luck",
        "toss again",
    ):
        assert part in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("b ")]
    assert row == ["b", "1", "0", "0", "1", "0", "10", "min", "0"]
    (row,) = [line.split() for line in text.splitlines() if line.startswith("sft ")]
    assert row == ["sft", "70", "45%"]
    write_lease(run, heard_s=100)
    text = drawn(status.read(run, NOW))
    assert "lost:" in text
    assert "left -" in text
    assert "interrupted" in text


def test_markup_in_a_reason_is_text(run: Run) -> None:
    book = Ledger(run, 7, every_s=0)
    book.update("di", problem="[bold]x[/nope]")
    book.close()
    assert "[bold]x[/nope]" in drawn(status.read(run, NOW))


def test_durations() -> None:
    said = [status.duration(s) for s in (0.4, 119, 120, 7199, 7200, 12_000, 48 * 3600, 100 * 3600)]
    assert said == ["0 s", "119 s", "2 min", "2 h 0 min", "2 h 0 min", "3 h 20 min", "2 d 0 h", "4 d 4 h"]
