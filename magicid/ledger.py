"""How every identity of a run stands, kept on storage: what `magicid status` reads, with or without a cluster.

    ledger/snapshot-<fence>-<number>.parquet     all identities at one moment
    ledger/events-<fence>-<number>.jsonl         the identities that changed since, newest state each

A reader takes the newest snapshot and the events after it. Files are whole or absent and never changed; the order is
(fence, number), where the fence grows with each driver of the run. The artefacts themselves are the truth about what is
finished: a ledger that lost its last seconds costs nothing but a look at storage.

Events are merged as a log-structured tree merges its levels: of every _MERGED files one of the next level is made. So a
reader finds few files, and what a change costs does not grow with the run, as it would if all were written again.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from magicid import schema, storage
from magicid.errors import LeaseError, MagicIDError, StorageError
from magicid.run import Run

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
STATES = (WAITING, RUNNING, DONE, FAILED, CANCELLED)
STAGES = ("check", "photo clips", "sft", "trained clips", "still clips", "pairs", "hpo", "evaluation", "publish")

_NAME = re.compile(r"(snapshot|events)-(\d+)-(\d+)\.(?:parquet|jsonl)$")
_MERGED = 40  # files of events that become one of the next level
_MANY = 1000  # changes that are worth a snapshot, where they are most of the run
_EVERY_S, _EVERY_S_PER_RECORD, _EVERY_S_AT_MOST = 2.0, 0.012, 120.0  # large runs are written less often
_READS = 10


@dataclass(frozen=True, slots=True)
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
    problem: str | None = None  # why it failed, or else its last clip that did
    action: str | None = None  # what to do
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
        every_s: seconds between two writes; None: 2 s for small runs, up to 120 s for large ones; 0: `flush` is called
            by somebody else.
        may_write: raises when the run was lost to another driver.

    Attributes:
        states: how many records are in each state.
        problem: why the last write failed; the next one may go well.
    """

    def __init__(
        self, run: Run, fence: int, *, every_s: float | None = None, may_write: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.fence, self._every_s, self._may_write = run, fence, every_s, may_write
        self.records: dict[str, Record] = read(run)
        self.states: Counter[str] = Counter(record.state for record in self.records.values())
        self._changed: set[str] = set()
        self._levels: list[list[tuple[str, set[str]]]] = []  # files of events and whom they are about, by level
        self._number = 0
        self._lock, self._writing, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self.problem: MagicIDError | None = None
        self._thread = threading.Thread(target=self._write_behind, daemon=True)
        self._snapshot()
        if every_s != 0:
            self._thread.start()

    def update(self, identity_id: str, **changes: Any) -> None:
        """Change a record; it is on storage within seconds. Unknown ids need `owner` among the changes."""
        with self._lock:
            known = self.records.get(identity_id)
            if known is None or any(getattr(known, name) != value for name, value in changes.items()):
                self._keep(known, replace(known or Record(identity_id, changes["owner"]), **changes))

    def add_seconds(self, identity_id: str, **seconds: float) -> None:
        """Count device-seconds of an identity, by what it kept busy."""
        with self._lock:
            record = self.records.get(identity_id)
            if record is None:  # forgotten meanwhile
                return
            counted = dict(record.seconds)
            for kind, value in seconds.items():
                counted[kind] = counted.get(kind, 0.0) + value
            self._keep(record, replace(record, seconds=counted))

    def _keep(self, known: Record | None, record: Record) -> None:
        if known is not None:
            self.states[known.state] -= 1
        self.states[record.state] += 1
        self.records[record.identity_id] = record
        self._changed.add(record.identity_id)

    def forget(self, identity_id: str) -> None:
        """Drop a record for good: the person was erased."""
        with self._lock:
            record = self.records.pop(identity_id, None)
            self._changed.discard(identity_id)
            if record is not None:
                self.states[record.state] -= 1
        self._snapshot()

    @property
    def pause_s(self) -> float:
        """Seconds between two writes now."""
        every_s = min(_EVERY_S_AT_MOST, max(_EVERY_S, _EVERY_S_PER_RECORD * len(self.records)))
        return self._every_s or every_s

    def flush(self) -> None:
        """Write what changed now. Raises StorageError."""
        with self._writing:
            self._may_write()
            with self._lock:
                most = len(self._changed) > max(_MANY, len(self.records) // 2)
                changed, self._changed = self._changed, set()
            if not changed:
                return
            if most:  # a manifest was taken up: a table is the smaller file
                self._write_snapshot(changed)
                return
            try:
                written = self._events(changed)
            except StorageError:
                with self._lock:
                    self._changed |= changed
                raise
            self._merge(0, written, changed)

    def _events(self, names: set[str]) -> str:
        """Write the newest state of some records as a file of events; returns its location."""
        with self._lock:
            found = [self.records[name] for name in sorted(names) if name in self.records]
        self._number += 1
        location = self._path("events", "jsonl")
        lines = (json.dumps(schema.to_row(record), sort_keys=True) + "\n" for record in found)
        storage.write_bytes(location, "".join(lines).encode())
        return location

    def _merge(self, level: int, location: str, names: set[str]) -> None:
        """Note a new file; one of the next level, newer than all of them, takes the place of a full level."""
        if level == len(self._levels):
            self._levels.append([])
        files = self._levels[level]
        files.append((location, names))
        if len(files) < _MERGED:
            return
        together = set().union(*(about for _, about in files))
        merged = self._events(together)
        self._levels[level] = []
        for old, _ in files:
            storage.remove(old)
        self._merge(level + 1, merged, together)

    def close(self) -> None:
        """Write the last changes and stop. Raises StorageError."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()
        self._snapshot()

    def _write_behind(self) -> None:
        while not self._stop.wait(self.pause_s):
            try:
                self.flush()
                self.problem = None
            except LeaseError:  # the run is another driver's now; the main thread finds out by itself
                return
            except StorageError as error:
                self.problem = error
            except Exception as error:  # whatever it is, the next records may be written
                self.problem = MagicIDError(f"{type(error).__name__}: {error}", "report this as a defect")

    def _snapshot(self) -> None:
        """Write all records, and remove what they replace."""
        with self._writing:
            self._may_write()
            with self._lock:
                changed, self._changed = self._changed, set()
            self._write_snapshot(changed)

    def _write_snapshot(self, changed: set[str]) -> None:
        with self._lock:
            records = list(self.records.values())
        self._number += 1
        newest = self._path("snapshot", "parquet")
        try:
            storage.write_table(newest, map(schema.to_row, records), schema.arrow_schema(Record))
        except StorageError:
            with self._lock:
                self._changed |= changed
            raise
        self._levels.clear()
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
            files = _files(run)
            if files == _files(run):  # a listing is no moment: it may miss a new file and those that went for it
                return _read(files)
        except StorageError:  # a file went because a newer one holds its rows: look again
            if attempt == _READS - 1:
                raise
        time.sleep(0.2)
    return _read(_files(run))


def _read(files: list[str]) -> dict[str, Record]:
    snapshots = [location for location in files if "/snapshot-" in location]
    records: dict[str, Record] = {}
    first = (-1, -1)
    if snapshots:
        first = _order(snapshots[-1])
        for row in storage.iter_table(snapshots[-1]):
            records[row["identity_id"]] = schema.from_row(Record, row)
    for location in files:
        if "/events-" in location and _order(location) > first:
            for row in _rows(location):
                records[row["identity_id"]] = schema.from_row(Record, row)
    return records


def _rows(location: str) -> Iterator[dict[str, Any]]:
    for line in storage.read_bytes(location).splitlines():
        yield json.loads(line)


def _files(run: Run) -> list[str]:
    """Ledger files, oldest first."""
    return sorted((f for f in storage.list_files(run.path("ledger")) if _NAME.search(f)), key=_order)


def _order(location: str) -> tuple[int, int]:
    found = _NAME.search(location)
    return (int(found.group(2)), int(found.group(3))) if found else (-1, -1)
