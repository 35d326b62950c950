"""`magicid status`, `retry` and `cancel`, as an operator types them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magicid import commands, ledger
from magicid.cli import app
from magicid.lease import Lease
from magicid.ledger import Ledger
from magicid.run import Run

cli = CliRunner()
WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path / "run"))
    book = Ledger(run, 1, every_s=0)
    book.update("ada", owner="a", state=ledger.DONE, stage="publish", adapter="v", seconds={"sft": 4.0})
    book.update("bo", owner="a", state=ledger.RUNNING, stage="sft", done=3, total=9, began=time.time())
    book.update("cy", owner="b", state=ledger.FAILED, stage="check", problem="no face", action="other photos")
    book.update("di", owner="b", state=ledger.CANCELLED)
    book.close()
    return run


def said(*arguments: str) -> str:
    result = cli.invoke(app, list(arguments), env=WIDE)
    assert result.exit_code == 0, result.output
    return result.output


def asked(run: Run) -> list[tuple[str, str]]:
    return [(command.action, command.identity_id) for command in commands.pending(run)]


def test_status_of_a_run_that_nobody_drives(run: Run) -> None:
    text = said("status", run.location)
    assert "never started" in text
    assert "3 of 4 identities" in text
    assert "interrupted" in text
    assert "no face" in text
    failed = said("status", run.location, "--failed")
    assert "other photos" in failed
    assert "ada" not in failed


def test_status_of_a_run_that_is_driven(run: Run) -> None:
    lease = Lease.take(run, 3600)
    found = json.loads(said("status", run.location, "--json"))
    assert found["driver"]["state"] == "running"
    assert found["states"]["running"] == 1
    lease.release()
    assert json.loads(said("status", run.location, "--json"))["driver"]["state"] == "stopped"


def test_watch_ends_with_the_run(run: Run) -> None:
    lease = Lease.take(run, 3600)
    watching = subprocess.Popen(
        [sys.executable, "-m", "magicid.cli", "status", run.location, "--watch"], stdout=subprocess.PIPE, text=True
    )
    with pytest.raises(subprocess.TimeoutExpired):
        watching.wait(8)  # it would have ended by itself long ago
    lease.release()
    output, _ = watching.communicate(timeout=120)
    assert watching.returncode == 0
    assert "stopped" in output


def test_no_run_is_an_error_in_one_line(tmp_path: Path) -> None:
    for command in (["status"], ["status", "--json"], ["retry", "--all"], ["cancel", "ada"]):
        result = cli.invoke(app, [command[0], str(tmp_path), *command[1:]])
        assert result.exit_code == 2
        assert "holds no run" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_cancel_and_retry_say_when_they_are_obeyed(run: Run) -> None:
    assert "when the job is submitted again; no driver is at work" in said("cancel", run.location, "bo")
    lease = Lease.take(run, 3600)
    assert "cy: will be retried within half a minute" in said("retry", run.location, "cy")
    lease.release()
    assert asked(run) == [("cancel", "bo"), ("retry", "cy")]


def test_retry_of_many(run: Run) -> None:
    said("retry", run.location, "--failed")
    assert asked(run) == [("retry", "cy")]
    said("retry", run.location, "--all")
    assert asked(run) == [("retry", "cy"), ("retry", "cy"), ("retry", "di")]
    for wrong in ([], ["cy", "--all"], ["--failed", "--all"]):
        result = cli.invoke(app, ["retry", run.location, *wrong])
        assert result.exit_code == 2
        assert "give ids, or --failed, or --all" in result.stderr


def test_unknown_ids_are_named(run: Run) -> None:
    result = cli.invoke(app, ["cancel", run.location, "bo", "eve"])
    assert result.exit_code == 2
    assert "knows no identity eve" in result.stderr
    assert asked(run) == []
