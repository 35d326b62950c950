"""What people ask of a run, as files that the driver takes up."""

from __future__ import annotations

from pathlib import Path

import pytest

from magicid import commands, ledger, storage
from magicid.errors import IdentityError
from magicid.ledger import Ledger
from magicid.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path / "run"))
    book = Ledger(run, 1, every_s=0)
    for state in ledger.STATES:
        book.update(f"is-{state}", owner="t", state=state)
    book.close()
    return run


def asked(run: Run) -> list[tuple[str, str]]:
    return [(command.action, command.identity_id) for command in commands.pending(run)]


def test_commands_are_taken_up_in_order(run: Run) -> None:
    sent = commands.send(run, commands.CANCEL, ["is-running", "is-waiting", "is-running"])
    assert [record.state for record in sent] == ["running", "waiting"]
    commands.send(run, commands.RETRY, ["is-failed"])
    assert asked(run) == [("cancel", "is-running"), ("cancel", "is-waiting"), ("retry", "is-failed")]
    storage.remove(next(commands.pending(run)).location)
    assert asked(run) == [("cancel", "is-waiting"), ("retry", "is-failed")]


def test_unknown_people_are_named_and_nothing_is_sent(run: Run) -> None:
    with pytest.raises(IdentityError, match="knows no identity eve, mallory — see `magicid status`"):
        commands.send(run, commands.CANCEL, ["is-running", "eve", "mallory"])
    assert asked(run) == []


@pytest.mark.parametrize(
    ("action", "name", "said"),
    [
        (commands.CANCEL, "is-done", r"is-done \(done\) — a finished adapter is removed with `magicid adapters"),
        (commands.CANCEL, "is-failed", r"is-failed \(failed\) — only what is waiting or running can be cancelled"),
        (commands.RETRY, "is-running", r"is-running \(running\) — only what is failed or cancelled can be retried"),
    ],
)
def test_what_means_nothing_is_refused(run: Run, action: str, name: str, said: str) -> None:
    with pytest.raises(IdentityError, match=said):
        commands.send(run, action, [name])
    assert asked(run) == []


def test_a_file_that_is_no_command_is_removed(run: Run) -> None:
    for name, content in (("1.json", b"{"), ("2.json", b"[]"), ("3.json", b'{"action": "dance", "identity_id": "x"}')):
        storage.write_bytes(run.path("commands", name), content)
    commands.send(run, commands.RETRY, ["is-cancelled"])
    assert asked(run) == [("retry", "is-cancelled")]
    assert len(storage.list_files(run.path("commands"))) == 1
