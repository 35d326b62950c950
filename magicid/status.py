"""A run's state as numbers, from its ledger and its lease: tenants, stages, time left, cost, what failed and why.

Everything is read from storage, so it can be asked with or without a cluster. Costs are device-seconds: a GPU for a
second, or a worker process where the recipe gives it none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from magicid import lease, ledger, storage
from magicid.errors import StorageError
from magicid.ledger import Record
from magicid.run import Run

FORMAT = 1  # of `to_json`; grows when a key changes its meaning or goes
INTERRUPTED = "interrupted"  # running, says the ledger, but no driver is alive: the next submission goes on with it
STATES = (ledger.WAITING, ledger.RUNNING, INTERRUPTED, ledger.DONE, ledger.FAILED, ledger.CANCELLED)
NEVER, DRIVING, STOPPED, ENDED, LOST = "never started", "running", "stopped", "ended", "lost"
_RATE_FROM_S = 60.0  # younger runs say no time left: the start is not the pace


@dataclass(frozen=True)
class Driver:
    """Who drives the run, or did last.

    `state` is NEVER, DRIVING, STOPPED (it said goodbye with work left), ENDED (with none left) or LOST (its heartbeat
    stopped). `heard_s`: seconds since the last heartbeat, by the two machines' own clocks.
    """

    state: str
    host: str = ""
    pid: int = 0
    fence: int = 0
    began: float = 0.0
    heard_s: float | None = None
    submission: str = ""

    def __str__(self) -> str:
        if self.state == NEVER:
            return NEVER
        ago = f"{duration(self.heard_s or 0.0)} ago"
        where = f"{self.host} (process {self.pid}, start {self.fence})"
        if self.state == DRIVING:
            return f"running on {where}, heard of {ago}"
        if self.state == LOST:
            return f"lost: {where} was last heard of {ago}; submit the job again and it goes on"
        return f"{self.state} {ago}" + ("; submit the job again and it goes on" if self.state == STOPPED else "")


@dataclass(frozen=True)
class Tenant:
    """One owner's part of a run. Seconds are device-seconds."""

    owner: str
    states: Counter[str]
    stages: Counter[str]  # of what is under way
    seconds: Counter[str]
    oldest_wait_s: float | None


@dataclass(frozen=True)
class Status:
    """A run at one moment.

    Attributes:
        left_s: about how long the rest takes at the pace of this driver; None where there is no pace yet.
        attempts: tries of training stages, over all identities.
    """

    location: str
    at: float
    driver: Driver
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
    def stages(self) -> Counter[str]:
        """Identities under way, by stage."""
        return sum((tenant.stages for tenant in self.tenants), Counter())

    @property
    def seconds(self) -> Counter[str]:
        """Device-seconds by what was kept busy."""
        return sum((tenant.seconds for tenant in self.tenants), Counter())

    @property
    def under_way(self) -> list[Record]:
        """Those that have begun and not ended."""
        return [record for record in self.records if record.state == ledger.RUNNING]


def read(run: Run, now: float | None = None) -> Status:
    """The state of a run, from storage alone.

    Raises:
        StorageError: there is no run, or it cannot be read.
    """
    now = time.time() if now is None else now
    found = lease.newest(run)
    records = sorted(ledger.read(run).values(), key=lambda record: (record.owner, record.arrived, record.identity_id))
    if found is None and not records and not run.has("run.json"):
        name = storage.public_name(run.location)
        raise StorageError(f"{name} holds no run: it has no run.json, ledger or lease", "give the --out of a run")
    driver = _driver(found, records, now)
    owners: dict[str, list[Record]] = {}
    for record in records:
        owners.setdefault(record.owner, []).append(record)
    return Status(
        location=run.location,
        at=now,
        driver=driver,
        tenants=[_tenant(owner, mine, driver.state == DRIVING, now) for owner, mine in owners.items()],
        records=records,
        left_s=_left(records, driver.began, now) if driver.state == DRIVING else None,
        attempts=int(sum(sum(record.attempts.values()) for record in records)),
        failed=[record for record in records if record.state == ledger.FAILED],
    )


def _tenant(owner: str, records: Iterable[Record], driven: bool, now: float) -> Tenant:
    records = list(records)
    seconds: Counter[str] = Counter()
    for record in records:
        seconds.update(record.seconds)  # type: ignore[arg-type]  # Counter adds floats as well
    waits = [now - record.arrived for record in records if record.state == ledger.WAITING and record.arrived]
    return Tenant(
        owner,
        Counter(_state(record, driven) for record in records),
        Counter(record.stage for record in records if record.state == ledger.RUNNING),
        seconds,
        max(waits, default=None),
    )


def _state(record: Record, driven: bool) -> str:
    return INTERRUPTED if record.state == ledger.RUNNING and not driven else record.state


def _driver(found: dict[str, Any] | None, records: list[Record], now: float) -> Driver:
    if found is None:
        return Driver(NEVER)
    if lease.alive(found, now):
        state = DRIVING
    elif found["beat"].get("state") != "released":
        state = LOST
    else:
        state = STOPPED if any(r.state in (ledger.WAITING, ledger.RUNNING) for r in records) else ENDED
    heard = max(0.0, now - found["beat"].get("at", found["began"]))
    return Driver(
        state, found["host"], found["pid"], found["fence"], found["began"], heard, found.get("submission", "")
    )


def _left(records: list[Record], began: float, now: float) -> float | None:
    """Remaining identities, parts of one counted, at the pace since the driver began; its own work makes the pace."""
    elapsed = now - began
    open_records = [record for record in records if record.state in (ledger.WAITING, ledger.RUNNING)]
    made = sum(1.0 for record in records if record.ended is not None and record.ended >= began)
    made += sum(_share(record) for record in open_records if record.began is not None and record.began >= began)
    if not open_records or elapsed < _RATE_FROM_S or made == 0:
        return None
    return (len(open_records) - sum(_share(record) for record in open_records)) * elapsed / made


def _share(record: Record) -> float:
    """0..1, how much of an identity is done: stages count alike, the running one by its steps."""
    if record.stage not in ledger.STAGES:
        return 0.0
    part = record.done / record.total if record.total else 0.0
    return (ledger.STAGES.index(record.stage) + min(1.0, part)) / len(ledger.STAGES)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def to_json(status: Status) -> dict[str, Any]:
    """The status as plain values, for scripts. Keys stay; new ones may come. Times are Unix seconds.

    format            1
    run, at           the run's location; when it was read
    driver            {state, host, pid, start, began, heard_s, submission}; state: never started, running, stopped,
                      ended or lost
    states            identities by state: waiting, running, interrupted, done, failed, cancelled (all six)
    stages            identities under way by stage (all stages)
    tenants           [{owner, states, stages, device_seconds, oldest_wait_s or null}]
    device_seconds    what was kept busy -> seconds; device_seconds_total is their sum
    left_s            about how long the rest takes, or null
    attempts          tries of training stages
    under_way         [{identity, owner, stage, done, total, began}]; done and total in steps or clips
    failed            [{identity, owner, stage, problem, action, attempts, failed_clips, ended}]
    """
    driver = status.driver
    return {
        "format": FORMAT,
        "run": storage.public_name(status.location),
        "at": status.at,
        "driver": {
            "state": driver.state, "host": driver.host, "pid": driver.pid, "start": driver.fence,
            "began": driver.began, "heard_s": driver.heard_s, "submission": driver.submission,
        },
        "states": {state: status.states[state] for state in STATES},
        "stages": {stage: status.stages[stage] for stage in ledger.STAGES},
        "tenants": [
            {
                "owner": tenant.owner,
                "states": {state: tenant.states[state] for state in STATES},
                "stages": {stage: tenant.stages[stage] for stage in ledger.STAGES},
                "device_seconds": dict(tenant.seconds),
                "oldest_wait_s": tenant.oldest_wait_s,
            }
            for tenant in status.tenants
        ],
        "device_seconds": dict(status.seconds),
        "device_seconds_total": float(sum(status.seconds.values())),
        "left_s": status.left_s,
        "attempts": status.attempts,
        "under_way": [
            {
                "identity": r.identity_id, "owner": r.owner, "stage": r.stage, "done": r.done, "total": r.total,
                "began": r.began,
            }
            for r in status.under_way
        ],
        "failed": [
            {
                "identity": r.identity_id, "owner": r.owner, "stage": r.stage, "problem": r.problem,
                "action": r.action, "attempts": dict(r.attempts), "failed_clips": r.failed_clips, "ended": r.ended,
            }
            for r in status.failed
        ],
    }  # fmt: skip
