"""One driver for one run: the second refuses, a dead one is followed, a late one stops."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from magicid import lease, storage
from magicid.errors import LeaseError, StorageError
from magicid.lease import Lease
from magicid.ledger import Ledger
from magicid.run import Run

LEASE_S = 0.8


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


def elsewhere(run: Run, fence: int = 1) -> None:
    """Let the lease be another machine's, whose processes nobody here can look at."""
    location = run.path("driver", f"lease-{fence:08d}.json")
    storage.write_json(location, {**storage.read_json(location), "host": "far-away", "boot": "another", "pid": 41})


def silent(held: Lease) -> Lease:
    """A driver that stands still: no heartbeat any more, and no goodbye."""
    held._stop.set()
    held._thread.join()
    held._stop.clear()
    return held


def test_the_second_driver_refuses_and_names_the_first(run: Run) -> None:
    first = Lease.take(run, LEASE_S)
    told: list[str] = []
    with pytest.raises(LeaseError) as refused:
        Lease.take(run, LEASE_S, told.append)
    assert f"{socket.gethostname()} (process {os.getpid()})" in str(refused.value)
    assert "since " in str(refused.value)
    assert "magicid status" in refused.value.action
    assert "watched for 0.8 s" in told[0]
    first.check()
    first.release()


def test_a_released_run_is_taken_at_once_with_a_higher_fence(run: Run) -> None:
    for fence in range(1, 7):
        held = Lease.take(run, 3600)  # it would not wait that long
        assert held.fence == fence
        held.release()
    kept = [name.rsplit("/", 1)[1] for name in storage.list_files(run.path("driver"), ".json")]
    assert [name for name in kept if name.startswith("lease")] == ["lease-00000005.json", "lease-00000006.json"]


def test_a_driver_of_this_machine_that_was_killed_is_followed_at_once(run: Run) -> None:
    held = silent(Lease.take(run, 3600))
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    location = run.path("driver", "lease-00000001.json")
    storage.write_json(location, {**storage.read_json(location), "pid": child})
    after = Lease.take(run, 3600)
    assert (held.fence, after.fence) == (1, 2)
    after.release()


@pytest.mark.parametrize("key", ["boot", "pid_namespace"])
@pytest.mark.parametrize("other", ["another", None])
def test_an_equal_name_is_not_the_same_machine_or_container(run: Run, key: str, other: str | None) -> None:
    Lease.take(run, 3600).release()
    found: Any = lease.newest(run)
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    assert lease._known_dead({**found, "pid": child})
    assert not lease._known_dead({**found, "pid": child, key: other})


def test_the_patience_is_that_of_the_driver_that_is_watched(run: Run) -> None:
    slow = Lease.take(run, 3 * LEASE_S)
    elsewhere(run)
    told: list[str] = []
    with pytest.raises(LeaseError, match="is being driven on far-away"):
        Lease.take(run, LEASE_S / 8, told.append)  # by its own measure the other is late at every beat
    assert "watched for 2.4 s" in told[0]
    slow.release()


def test_a_stale_lease_is_taken_over_and_the_old_driver_stops_writing(run: Run) -> None:
    old = Lease.take(run, LEASE_S)
    book = Ledger(run, old.fence, every_s=0, may_write=old.check)
    silent(old)
    elsewhere(run)
    new = Lease.take(run, LEASE_S)
    assert new.fence == 2
    book.update("ada", owner="t")
    with pytest.raises(LeaseError, match="another start of the job"):
        book.flush()
    with pytest.raises(LeaseError):
        old.check()
    old.release()
    assert lease.newest(run)["fence"] == 2  # type: ignore[index]
    assert storage.read_json(run.path("driver", "beat-00000002.json"))["state"] == "driving"
    new.check()
    new.release()


def test_a_driver_that_slept_through_many_others_stops_too(run: Run) -> None:
    old = silent(Lease.take(run, LEASE_S))
    elsewhere(run)
    for _ in range(4):
        Lease.take(run, LEASE_S).release()
    assert not storage.exists(run.path("driver", "lease-00000002.json"))  # the next fence is forgotten already
    old._heard -= LEASE_S
    with pytest.raises(LeaseError, match="another start of the job"):
        old.check()


def test_of_many_at_once_one_drives(run: Run) -> None:
    ready, taken, refused = threading.Barrier(6), [], []

    def start() -> None:
        ready.wait()
        try:
            taken.append(Lease.take(run, LEASE_S))
        except LeaseError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 5)
    taken[0].check()
    taken[0].release()


def test_a_driver_that_cannot_be_heard_for_long_stops(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held = silent(Lease.take(run, LEASE_S))

    def broken(*_: Any) -> str:
        raise StorageError("no route to the store", "wait")

    monkeypatch.setattr(storage, "write_json", broken)
    held._heard -= LEASE_S / 2 + 0.01
    held.check()  # a store may be away for a moment
    held._heard -= LEASE_S
    with pytest.raises(LeaseError, match=r"heartbeat could not be written.*no route"):
        held.check()


def test_alive_is_by_heartbeat_and_goodbye(run: Run) -> None:
    assert lease.newest(run) is None
    assert not lease.alive(None)
    held = Lease.take(run, 3600)
    found: Any = lease.newest(run)
    assert lease.alive(found)
    assert not lease.alive(found, found["beat"]["at"] + 3601)
    held.release()
    assert not lease.alive(lease.newest(run))
