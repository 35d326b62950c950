"""How every identity of a run stands, kept on storage: what `magicid status` reads, with or without a cluster.

    ledger/snapshot-<fence>-<number>.parquet     all identities at one moment
    ledger/events-<fence>-<number>.jsonl         the identities that changed since, newest state each

A reader takes the newest snapshot and the events after it. Files are whole or absent and never changed; the order is
(fence, number), where the fence grows with each driver of the run. The artefacts themselves are the truth about what is
finished: a ledger that lost its last second costs nothing but a look at storage.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from magicid import schema, storage
from magicid.errors import StorageError
from magicid.run import Run

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
STATES = (WAITING, RUNNING, DONE, FAILED, CANCELLED)
STAGES = ("check", "photo clips", "sft", "trained clips", "pairs", "hpo", "evaluation", "publish")

_NAME = re.compile(r"(snapshot|events)-(\d+)-(\d+)\.(?:parquet|jsonl)$")
_EVENTS_PER_SNAPSHOT = 200
_READS = 5


@dataclass(frozen=True)
class Record:
    """One identity. Times are Unix seconds."""

    identity_id: str
    owner: str
    state: str = WAITING
    stage: str = ""
    done: float = 0.0  # of the stage: steps or clips
    total: float = 0.0
    priority: int = 0
    deadline: float | None = None
    arrived: float = 0.0
    began: float | None = None
    ended: float | None = None
    attempts: dict[str, float] = field(default_factory=dict)  # stage -> tries of its training
    seconds: dict[str, float] = field(default_factory=dict)  # what it kept busy -> device-seconds
    failed_clips: int = 0
    problem: str | None = None  # why it failed, and what to do
    action: str | None = None
    adapter: str | None = None  # the published version
    row_sha256: str = ""  # of the manifest row it was begun with

    @property
    def device_seconds(self) -> float:
        """All of `seconds`."""
        return sum(self.seconds.values())


class Ledger:
    """The driver's side: records in memory, written behind by a thread.

    Args:
        fence: number of this driver.
        may_write: raises when the run was lost to another driver.
    """

    def __init__(
        self, run: Run, fence: int, *, every_s: float = 2.0, may_write: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.fence, self._every_s, self._may_write = run, fence, every_s, may_write
        self.records: dict[str, Record] = read(run)
        self._changed: set[str] = set()
        self._number = 0
        self._lock, self._writing, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self.problem: StorageError | None = None  # of the last write; the next one may go well
        self._thread = threading.Thread(target=self._write_behind, daemon=True)
        self._snapshot()
        self._thread.start()

    def update(self, identity_id: str, **changes: Any) -> None:
        """Change a record; it is on storage within seconds. Unknown ids need `owner` among the changes."""
        with self._lock:
            known = self.records.get(identity_id) or Record(identity_id, changes["owner"])
            record = replace(known, **changes)
            if record != known or identity_id not in self.records:
                self.records[identity_id] = record
                self._changed.add(identity_id)

    def add_seconds(self, identity_id: str, kind: str, seconds: float) -> None:
        """Count device-seconds of an identity."""
        with self._lock:
            record = self.records.get(identity_id)
            if record is None:  # forgotten meanwhile
                return
            counted = {**record.seconds, kind: record.seconds.get(kind, 0.0) + seconds}
            self.records[identity_id] = replace(record, seconds=counted)
            self._changed.add(identity_id)

    def forget(self, identity_id: str) -> None:
        """Drop a record for good: the person was erased."""
        with self._lock:
            self.records.pop(identity_id, None)
            self._changed.discard(identity_id)
        self._snapshot()

    def flush(self) -> None:
        """Write what changed now. Raises StorageError."""
        with self._writing:
            self._may_write()
            with self._lock:
                changed, self._changed = sorted(self._changed), set()
                rows = [asdict(self.records[name]) for name in changed]
            if not rows:
                return
            try:
                text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
                self._number += 1
                storage.write_bytes(self._path("events", "jsonl"), text.encode())
            except StorageError:
                with self._lock:
                    self._changed |= set(changed)
                raise
        if self._number % _EVENTS_PER_SNAPSHOT == 0:
            self._snapshot()

    def close(self) -> None:
        """Write the last changes and stop. Raises StorageError."""
        self._stop.set()
        self._thread.join()
        self.flush()
        self._snapshot()

    def _write_behind(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.flush()
                self.problem = None
            except StorageError as error:
                self.problem = error
            except Exception:  # the run is another driver's now; the main thread finds out by itself
                return

    def _snapshot(self) -> None:
        """Write all records, and remove what they replace."""
        with self._writing:
            self._may_write()
            with self._lock:
                records = list(self.records.values())
                self._changed.clear()
            self._number += 1
            newest = self._path("snapshot", "parquet")
            storage.write_table(newest, schema.to_rows(records), schema.arrow_schema(Record))
            for location in _files(self.run):
                if _order(location) < (self.fence, self._number):
                    storage.remove(location)

    def _path(self, kind: str, suffix: str) -> str:
        return self.run.path("ledger", f"{kind}-{self.fence:08d}-{self._number:08d}.{suffix}")


def read(run: Run) -> dict[str, Record]:
    """All records of a run, from storage; {} when it has none.

    Raises:
        StorageError: the ledger cannot be read.
    """
    for attempt in range(_READS):
        try:
            return _read(_files(run))
        except StorageError:  # a file went because a newer snapshot came: look again
            if attempt == _READS - 1:
                raise
            time.sleep(0.2)
    raise AssertionError("unreachable")


def _read(files: list[str]) -> dict[str, Record]:
    snapshots = [location for location in files if "/snapshot-" in location]
    records: dict[str, Record] = {}
    first = (-1, -1)
    if snapshots:
        first = _order(snapshots[-1])
        rows = storage.read_table(snapshots[-1])
        records = {record.identity_id: record for record in (schema.from_row(Record, row) for row in rows)}
    for location in files:
        if "/events-" in location and _order(location) > first:
            for row in _events(location):
                record = schema.from_row(Record, row)
                records[record.identity_id] = record
    return records


def _events(location: str) -> Iterable[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_bytes(location).decode().splitlines()]


def _files(run: Run) -> list[str]:
    """Ledger files, oldest first."""
    return sorted((f for f in storage.list_files(run.path("ledger")) if _NAME.search(f)), key=_order)


def _order(location: str) -> tuple[int, int]:
    found = _NAME.search(location)
    return (int(found.group(2)), int(found.group(3))) if found else (-1, -1)
