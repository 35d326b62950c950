"""One driver for one run: a lease with a fence, on any storage, without locks and without renames.

    driver/lease-<fence>.json     made by the driver that took this fence, exclusively
    driver/beat-<fence>.json      written again and again by it while it lives

The highest fence drives. A driver takes the next fence when the one before has released its own, when its process is
known to be dead, or when its heartbeat did not change for `lease_s`, the longer one of both starts, on the watcher's
own clock; clocks of two machines are never compared. Two who try at once cannot both make the same file. Who was
overtaken finds the higher fence at its next heartbeat and stops; everything it wrote meanwhile is content-addressed or
carries its lower fence.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magicid import storage
from magicid.errors import LeaseError, StorageError
from magicid.run import Run


class Lease:
    """The right to drive a run. `take` waits for `lease_s` at most, or that of the last driver if it is longer; the
    heartbeat runs in a thread until `release`."""

    def __init__(self, run: Run, fence: int, lease_s: float) -> None:
        self.run, self.fence, self.lease_s = run, fence, lease_s
        self._stop, self._looking, self._heard = threading.Event(), threading.Lock(), 0.0
        self._lost: str | None = None
        self._beats = 0
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._beat("driving")
        self._thread.start()

    @classmethod
    def take(
        cls, run: Run, lease_s: float, waiting: Callable[[str], None] = lambda text: None, submission: str = ""
    ) -> Lease:
        """Become the driver of a run.

        Args:
            submission: name of the job that this driver is, where it has one.
            waiting: told, once, when another driver's heartbeat has to be watched.

        Raises:
            LeaseError: another driver is at work, or was quicker.
            StorageError: the run directory cannot be read or written.
        """
        before = newest(run)
        if before is not None:
            _wait_until_free(run, before, lease_s, waiting)
        fence = (before["fence"] if before else 0) + 1
        content = {
            "fence": fence, "holder": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(),
            "began": time.time(), "submission": submission, **_processes(),
        }  # fmt: skip
        if not storage.create_bytes(_path(run, "lease", fence), json.dumps(content).encode()):
            raise LeaseError(
                f"another driver took {storage.public_name(run.location)} at the same moment",
                "let it work; `magicid status` shows how far it is",
            )
        for old in range(max(1, fence - 3), fence):  # a few old files tell the story, more would only be listed
            if old < fence - 1:
                storage.remove(_path(run, "beat", old))
                storage.remove(_path(run, "lease", old))
        return cls(run, fence, lease_s)

    def check(self) -> None:
        """Raises LeaseError when another driver has taken the run; looks itself where the heartbeat is late."""
        if self._lost is None and time.monotonic() - self._heard > self.lease_s / 2:
            self._look()
        if self._lost:
            raise LeaseError(self._lost, "let the other driver work; this one has stopped")

    def release(self) -> None:
        """Give the run back at once."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            if not self._lost:
                self._beat("released")

    def _keep(self) -> None:
        while not self._lost and not self._stop.wait(self.lease_s / 4):
            self._look()

    def _look(self) -> None:
        """See whether the run is still ours, and say that we live."""
        with self._looking:
            try:
                # A driver two starts later removed our lease, which is what one that slept very long finds.
                if storage.exists(_path(self.run, "lease", self.fence + 1)) or not storage.exists(
                    _path(self.run, "lease", self.fence)
                ):
                    self._lost = f"{storage.public_name(self.run.location)} is driven by another start of the job"
                else:
                    self._beat("driving")
            except StorageError as error:
                if time.monotonic() - self._heard > self.lease_s:  # others may rightly think that we are dead
                    self._lost = f"the heartbeat could not be written for {self.lease_s:.0f} s: {error.problem}"

    def _beat(self, state: str) -> None:
        began, self._beats = time.monotonic(), self._beats + 1
        content = {"state": state, "number": self._beats, "at": time.time(), "lease_s": self.lease_s}
        storage.write_json(_path(self.run, "beat", self.fence), content)
        self._heard = began


def newest(run: Run) -> dict[str, Any] | None:
    """The newest lease with its last heartbeat under `beat` ({} where none is there); None when nobody ever drove."""
    files = [f for f in storage.list_files(run.path("driver"), ".json") if "/lease-" in f]
    if not files:
        return None
    found: dict[str, Any] = storage.read_json(files[-1])
    return {**found, "beat": _read_beat(run, found["fence"])}


def alive(lease: dict[str, Any] | None, now: float | None = None) -> bool:
    """Whether the driver of a lease seems to be at work, by its own clock's heartbeat; for show only."""
    if lease is None or lease["beat"].get("state") != "driving" or _known_dead(lease):
        return False
    return bool((time.time() if now is None else now) - lease["beat"]["at"] < lease["beat"]["lease_s"])


def _wait_until_free(run: Run, lease: dict[str, Any], lease_s: float, waiting: Callable[[str], None]) -> None:
    beat = lease["beat"]
    if beat.get("state") == "released" or _known_dead(lease):
        return
    name = f"{lease['host']} (process {lease['pid']})"
    lease_s = max(lease_s, beat.get("lease_s", 0.0))  # it beats as often as its own start asked for
    waiting(f"the last driver, on {name}, did not say goodbye: its heartbeat is watched for {lease_s:g} s")
    end = time.monotonic() + lease_s
    while time.monotonic() < end:
        time.sleep(min(1.0, lease_s / 10))
        now = _read_beat(run, lease["fence"])
        if now.get("state") == "released":
            return
        if now != beat:
            raise LeaseError(
                f"{storage.public_name(run.location)} is being driven on {name} since {_time(lease['began'])}",
                "let it work; `magicid status` shows how far it is. To drive from here, stop that job first",
            )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _known_dead(lease: dict[str, Any]) -> bool:
    """Whether the driver ran on this machine, among the processes that are seen from here, and its own is gone."""
    here = _processes()
    if not here or any(lease.get(key) != value for key, value in here.items()):
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _processes() -> dict[str, str]:
    """Which numbering of processes this one is in: machines may share a name, and a container has its own numbers.

    {} where that cannot be known: on anything but Linux.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "pid_namespace": str(Path("/proc/self/ns/pid").readlink())}
    except OSError:
        return {}


def _read_beat(run: Run, fence: int) -> dict[str, Any]:
    location = _path(run, "beat", fence)
    return dict(storage.read_json(location)) if storage.exists(location) else {}


def _path(run: Run, kind: str, fence: int) -> str:
    return run.path("driver", f"{kind}-{fence:08d}.json")
