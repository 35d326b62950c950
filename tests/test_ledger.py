"""How a run stands, on storage: what a reader finds while the driver writes, merges and dies."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from magicid import ledger, storage
from magicid.errors import LeaseError, StorageError
from magicid.ledger import Ledger
from magicid.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path))


def test_what_is_flushed_is_read_and_what_is_not_is_the_older_state(run: Run) -> None:
    book = Ledger(run, 1, every_s=0)
    book.update("ada", owner="studio", state=ledger.RUNNING, attempts={"sft": 1.0}, deadline=12.5)
    book.flush()
    book.add_seconds("ada", sft=2.0, hpo=1.0)
    book.add_seconds("ada", sft=0.5)
    assert ledger.read(run) == {**book.records, "ada": ledger.Record(
        "ada", "studio", ledger.RUNNING, attempts={"sft": 1.0}, deadline=12.5)}  # fmt: skip
    book.close()
    assert ledger.read(run)["ada"].seconds == {"sft": 2.5, "hpo": 1.0}


def test_states_are_counted_as_they_change(run: Run) -> None:
    book = Ledger(run, 1, every_s=0)
    for name in ("ada", "ben", "eve"):
        book.update(name, owner="studio")
    book.update("ben", state=ledger.RUNNING)
    book.forget("eve")
    assert +book.states == {ledger.WAITING: 1, ledger.RUNNING: 1}
    book.close()
    assert +Ledger(run, 2, every_s=0).states == {ledger.WAITING: 1, ledger.RUNNING: 1}


def test_thousands_of_changes_stay_few_files_and_the_newest_state_wins(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_MERGED", 3)
    book = Ledger(run, 1, every_s=0)
    for number in range(100):
        book.update(f"p{number % 7}", owner="studio", done=float(number))
        book.flush()
        assert (
            len(storage.list_files(run.path("ledger"))) <= 1 + 2 * 5
        )  # 3**4 < 100: at most 2 files in each of 5 levels
        assert ledger.read(run) == book.records
    book.forget("p0")
    assert "p0" not in ledger.read(run)
    book.update("p1", done=-1.0)
    book.flush()
    assert ledger.read(Run(run.location)) == book.records


def test_a_failed_write_is_made_up_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Ledger(run, 1, every_s=0)
    book.update("ada", owner="studio", state=ledger.DONE)

    def full(*_: object) -> str:
        raise StorageError("the disk is full", "make room")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", full)
        with pytest.raises(StorageError):
            book.flush()
        with pytest.raises(StorageError):
            book.close()
    assert ledger.read(run) == {}
    book.flush()
    assert ledger.read(run) == book.records


def test_a_reader_looks_again_when_files_were_merged_under_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_MERGED", 3)
    book, real, meddled = Ledger(run, 1, every_s=0), ledger._read, []

    def change(times: int) -> None:
        for _ in range(times):
            done = book.records["ada"].done if "ada" in book.records else 0.0
            book.update("ada", owner="studio", done=done + 1)
            book.flush()

    def read_late(files: list[str]) -> dict[str, ledger.Record]:
        if len(meddled) < 2:
            meddled.append(len(files))
            change(3)  # the files that were listed are gone
        return real(files)

    change(2)
    monkeypatch.setattr(ledger, "_read", read_late)
    assert ledger.read(run)["ada"].done == 8
    assert len(meddled) == 2


def files(run: Run) -> list[str]:
    return [name.rsplit("/", 1)[1] for name in storage.list_files(run.path("ledger"))]


def test_a_new_driver_goes_on_and_the_old_ones_files_are_ignored(run: Run) -> None:
    old = Ledger(run, 1, every_s=0)
    old.update("ada", owner="t", stage="sft")
    old.update("bo", owner="t")
    old.flush()
    new = Ledger(run, 2, every_s=0)
    assert new.records["ada"].stage == "sft"
    new.update("ada", stage="hpo")
    new.flush()
    old.update("ada", stage="photo clips")  # it does not know yet that it was overtaken
    old.update("late", owner="t")
    old.flush()
    found = ledger.read(run)
    assert {name: record.stage for name, record in found.items()} == {"ada": "hpo", "bo": ""}
    new.close()
    assert all("-00000002-" in name for name in files(run))  # and they are swept away


def test_a_driver_that_lost_its_run_writes_nothing(run: Run) -> None:
    lost: list[Exception] = []

    def may_write() -> None:
        if lost:
            raise lost[0]

    book = Ledger(run, 1, every_s=0, may_write=may_write)
    book.update("ada", owner="t")
    lost.append(LeaseError("it is another's", "stop"))
    before = files(run)
    for write in (book.flush, book.close):
        with pytest.raises(LeaseError):
            write()
    assert files(run) == before


def test_written_behind_without_being_asked(run: Run) -> None:
    book = Ledger(run, 1, every_s=0.01)
    book.update("ada", owner="t")
    for _ in range(3000):
        if ledger.read(run):
            break
        threading.Event().wait(0.01)
    assert list(ledger.read(run)) == ["ada"]
    with pytest.raises(KeyError):
        book.update("new", state=ledger.WAITING)  # whose?
    book.close()


def test_changes_made_together_are_seen_together(run: Run) -> None:
    book = Ledger(run, 1, every_s=0)
    for name in ("ada", "bo"):
        book.update(name, owner="t")
    book.flush()
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.wait(0.01):
            number += 1
            for name in ("ada", "bo"):
                book.update(name, done=float(number))
            book.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            found = ledger.read(run)
            assert found["ada"].done == found["bo"].done
    finally:
        stop.set()
        writer.join()


def test_a_manifest_that_is_taken_up_becomes_a_snapshot(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_MANY", 5)
    book = Ledger(run, 1, every_s=0)
    for number in range(10):
        book.update(f"p{number}", owner="studio")
    book.flush()
    assert [name.rsplit("/", 1)[1] for name in storage.list_files(run.path("ledger"))] == [
        "snapshot-00000001-00000002.parquet"
    ]
    assert ledger.read(run) == book.records
