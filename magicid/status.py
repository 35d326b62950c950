"""A run's state as numbers, from its ledger and its lease: tenants, stages, time left, cost, what failed and why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from magicid import lease, ledger
from magicid.ledger import Record
from magicid.run import Run

_RATE_FROM_S = 60.0  # younger runs say no time left: the start is not the pace


@dataclass(frozen=True)
class Tenant:
    """One owner's part of a run. Seconds are device-seconds."""

    owner: str
    states: Counter[str]
    stages: Counter[str]  # of what runs
    seconds: Counter[str]
    oldest_wait_s: float | None


@dataclass(frozen=True)
class Status:
    """A run at one moment.

    Attributes:
        driver: what can be said of who drives it: running on ..., stopped ..., finished, never started.
        left_s: about how long the rest takes at the pace of the last driver; None where there is no pace yet.
    """

    location: str
    driver: str
    running: bool
    tenants: list[Tenant]
    records: list[Record]
    left_s: float | None
    attempts: int
    failed: list[Record] = field(default_factory=list)

    @property
    def states(self) -> Counter[str]:
        """Identities by state."""
        return sum((tenant.states for tenant in self.tenants), Counter())

    @property
    def seconds(self) -> Counter[str]:
        """Device-seconds by what was kept busy."""
        return sum((tenant.seconds for tenant in self.tenants), Counter())


def read(run: Run, now: float | None = None) -> Status:
    """The state of a run, from storage alone.

    Raises:
        StorageError: it cannot be read.
    """
    now = time.time() if now is None else now
    records = sorted(ledger.read(run).values(), key=lambda record: (record.owner, record.arrived, record.identity_id))
    found = lease.newest(run)
    running = lease.alive(found)
    owners = dict.fromkeys(record.owner for record in records)
    return Status(
        location=run.location,
        driver=_driver(found, running, records, now),
        running=running,
        tenants=[_tenant(owner, (r for r in records if r.owner == owner), now) for owner in owners],
        records=records,
        left_s=_left(records, found["began"], now) if running and found else None,
        attempts=int(sum(sum(record.attempts.values()) for record in records)),
        failed=[record for record in records if record.state == ledger.FAILED],
    )


def _tenant(owner: str, records: Iterable[Record], now: float) -> Tenant:
    records = list(records)
    seconds: Counter[str] = Counter()
    for record in records:
        seconds.update(record.seconds)  # type: ignore[arg-type]  # Counter adds floats as well
    waits = [now - record.arrived for record in records if record.state == ledger.WAITING and record.arrived]
    return Tenant(
        owner,
        Counter(record.state for record in records),
        Counter(record.stage for record in records if record.state == ledger.RUNNING),
        seconds,
        max(waits, default=None),
    )


def _driver(found: dict | None, running: bool, records: list[Record], now: float) -> str:  # type: ignore[type-arg]
    if found is None:
        return "never started"
    where = f"{found['host']} (process {found['pid']}, start {found['fence']})"
    ago = f"{max(0.0, now - found['beat'].get('at', found['began'])):.0f} s ago"
    if running:
        return f"running on {where}, heard of {ago}"
    open_states = (ledger.WAITING, ledger.RUNNING)
    if found["beat"].get("state") == "released":
        return f"stopped {ago}" if any(record.state in open_states for record in records) else f"ended {ago}"
    return f"lost: {where} was last heard of {ago}; submit the job again and it goes on"


def _left(records: list[Record], began: float, now: float) -> float | None:
    """Remaining identities, parts of one counted, at the pace since the driver began."""
    elapsed = now - began
    ended = sum(1 for record in records if record.ended is not None and record.ended >= began)
    open_records = [record for record in records if record.state in (ledger.WAITING, ledger.RUNNING)]
    started = sum(_share(record) for record in open_records)
    if elapsed < _RATE_FROM_S or ended + started == 0:
        return None
    return (len(open_records) - started) * elapsed / (ended + started)


def _share(record: Record) -> float:
    """0..1, how much of an identity is done: stages count alike, the running one by its steps."""
    if record.stage not in ledger.STAGES:
        return 0.0
    part = record.done / record.total if record.total else 0.0
    return (ledger.STAGES.index(record.stage) + min(1.0, part)) / len(ledger.STAGES)
