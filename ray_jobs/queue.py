"""A weighted-fair queue of tasks with holders and attempts. Plain Python on a clock that can be given.

Between owners: start-time fair queueing. Each task advances its owner's virtual time by cost / weight, the owner who is
furthest behind goes first, and one who comes back after a pause starts at the present: neither starved nor ahead.
Within an owner: the smallest `due` first. `due_time` makes it from arrival, priority and deadline, so that priority
wins for a while and ageing wins in the end: nothing waits for ever.

A holder (a training slot, a ticket of the clip pipeline) has at most one task. One that comes back after a crash gets
its task again, until the attempts are used up.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work: an identity in one training stage, or a few clips."""

    task_id: str
    owner: str
    cost: float  # what fairness counts: training steps, or clips
    due: float = 0.0  # smaller is earlier, within the owner
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a task ended: `done` with what the holder gave, or `failed` with the last reason."""

    task_id: str
    state: str
    attempts: int
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0  # that holders had it, over all attempts


@dataclass(slots=True)
class Held:
    """A task in somebody's hands."""

    task: Task
    since: float
    note: dict[str, Any] = field(default_factory=dict)  # what the holder last told


class FairQueue:
    """The queue; every method is quick.

    Args:
        weights: share of each owner, 1.0 where not given.
        quotas: most tasks of an owner that are held at once; no limit where not given.
        max_attempts: tries of one task before it is failed with its last reason.
        max_held: most tasks held at once, over all owners; None: as many as ask.
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        quotas: Mapping[str, int] | None = None,
        max_attempts: int = 3,
        max_held: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._weights, self._quotas = dict(weights or {}), dict(quotas or {})
        self._max_attempts, self._max_held, self._clock = max_attempts, max_held, clock
        self._tasks: dict[str, Task] = {}  # waiting and held
        self._heaps: dict[str, list[tuple[float, int, str]]] = {}  # owner -> (due, number, task id) of what waits
        self._put_at: dict[str, float] = {}
        self._held: dict[str, Held] = {}
        self._of_owner: Counter[str] = Counter()  # held tasks
        self._tags: dict[str, float] = {}  # owner -> virtual time at which its next task starts
        self._now = 0.0  # virtual time: the start tag of the task that was taken last
        self._attempts: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._ended: list[Ended] = []
        self._numbers = itertools.count()

    def put(self, task: Task) -> None:
        """Add a task; one that waits or is held already is left as it is."""
        if task.task_id in self._tasks:
            return
        self._tasks[task.task_id] = task
        self._put_at[task.task_id] = self._clock()
        self._wait(task)

    def _wait(self, task: Task) -> None:
        heap = self._heaps.setdefault(task.owner, [])
        if not heap and not self._of_owner[task.owner]:
            self._tags[task.owner] = max(self._tags.get(task.owner, 0.0), self._now)
        heapq.heappush(heap, (task.due, next(self._numbers), task.task_id))

    def take(self, holder: str) -> Task | None:
        """The next task for a holder, or the one it has already; None when nothing may be taken now."""
        if holder in self._held:
            if self._attempts[self._held[holder].task.task_id] < self._max_attempts:
                held = self._held[holder]
                self._attempts[held.task.task_id] += 1
                return held.task
            self.fail(holder, "its process died")
        if self._max_held is not None and len(self._held) >= self._max_held:
            return None
        ready = [owner for owner, heap in self._heaps.items() if heap and self._may_have(owner)]
        if not ready:
            return None
        owner = min(ready, key=lambda name: (self._tags[name], self._heaps[name][0]))
        _, _, task_id = heapq.heappop(self._heaps[owner])
        task = self._tasks[task_id]
        self._now = self._tags[owner]
        self._tags[owner] += self._advance(task)
        self._of_owner[owner] += 1
        self._attempts[task_id] += 1
        self._held[holder] = Held(task, self._clock())
        return task

    def _advance(self, task: Task) -> float:
        """Virtual time that a task is worth to its owner."""
        return task.cost / self._weights.get(task.owner, 1.0)

    def upcoming(self, number: int) -> list[Task]:
        """The next tasks in the order in which they would be taken if no other came; quotas left aside."""
        entries = {owner: heapq.nsmallest(number, heap) for owner, heap in self._heaps.items() if heap}
        tags, found = dict(self._tags), list[Task]()
        while entries and len(found) < number:
            owner = min(entries, key=lambda name: (tags[name], entries[name][0]))
            task = self._tasks[entries[owner].pop(0)[2]]
            tags[owner] += self._advance(task)
            found.append(task)
            if not entries[owner]:
                del entries[owner]
        return found

    def _may_have(self, owner: str) -> bool:
        quota = self._quotas.get(owner)
        return quota is None or self._of_owner[owner] < quota

    def progress(self, holder: str, task_id: str, note: dict[str, Any]) -> bool:
        """A holder tells how far it is; False: the task is no longer its own (cancelled), so stop."""
        held = self._held.get(holder)
        if held is None or held.task.task_id != task_id:
            return False
        held.note = note
        return True

    def call_for(self, task_id: str, holder: str, method: str, *arguments: Any) -> None:
        """`done`, `fail` or `release` of a holder, if this is still the task it has: with several workers, one may
        be late."""
        if holder in self._held and self._held[holder].task.task_id == task_id:
            getattr(self, method)(holder, *arguments)

    def done(self, holder: str, result: dict[str, Any]) -> None:
        """A holder's task is finished. Nothing happens when it no longer has one."""
        self._end(holder, "done", result, None)

    def fail(self, holder: str, error: str) -> None:
        """A holder's task cannot be finished; the reason is kept."""
        task = self._held[holder].task.task_id if holder in self._held else ""
        known = self._reasons.get(task)
        tried = f" (try {self._attempts[task]} of {self._max_attempts})" if self._attempts[task] > 1 else ""
        self._end(holder, "failed", {}, known if known and error == "its process died" else f"{error}{tried}")

    def finish(self, task_id: str) -> None:
        """A task is finished, whoever holds it, and who says so knows: it is not reported."""
        for holder, held in list(self._held.items()):
            if held.task.task_id == task_id:
                self._let_go(holder)
                self._forget(task_id)

    def release_all(self, error: str) -> None:
        """Every holder is gone."""
        for holder in list(self._held):
            self.release(holder, error)

    def task(self, task_id: str) -> Task | None:
        """A task that waits or is held."""
        return self._tasks.get(task_id)

    def _end(self, holder: str, state: str, result: dict[str, Any], error: str | None) -> None:
        held = self._let_go(holder)
        if held is not None:
            task_id = held.task.task_id
            self._ended.append(Ended(task_id, state, self._attempts[task_id], result, error, self._seconds[task_id]))
            self._forget(task_id)

    def _let_go(self, holder: str) -> Held | None:
        held = self._held.pop(holder, None)
        if held is not None:
            self._of_owner[held.task.owner] -= 1
            self._seconds[held.task.task_id] += self._clock() - held.since
        return held

    def _forget(self, task_id: str) -> None:
        for kept in (self._tasks, self._put_at, self._attempts, self._reasons, self._seconds):
            kept.pop(task_id, None)  # type: ignore[attr-defined]

    def release(self, holder: str, error: str, *, counted: bool = True) -> None:
        """A holder is gone: its task waits again, or fails when its attempts are used up.

        Args:
            counted: False: the try does not count, since the machine was lost and not the task to blame.
        """
        if holder not in self._held:
            return
        task = self._held[holder].task
        self._reasons[task.task_id] = error
        if not counted:
            self._attempts[task.task_id] -= 1
        if self._attempts[task.task_id] >= self._max_attempts:
            self.fail(holder, error)
            return
        self._let_go(holder)
        self._wait(task)

    def cancel(self, task_id: str) -> None:
        """Drop a task, wherever it is; its holder is told at its next `progress`. Nothing is reported."""
        if task_id not in self._tasks:
            return
        task = self._tasks[task_id]
        for holder, held in list(self._held.items()):
            if held.task.task_id == task_id:
                self._let_go(holder)
        heap = self._heaps.get(task.owner, [])
        heap[:] = [entry for entry in heap if entry[2] != task_id]
        heapq.heapify(heap)
        self._forget(task_id)

    def ended(self) -> list[Ended]:
        """What ended since the last call."""
        found, self._ended = self._ended, []
        return found

    @property
    def has_ended(self) -> bool:
        """Whether `ended` would return any."""
        return bool(self._ended)

    def held(self) -> dict[str, Held]:
        """What is in hand, by holder."""
        return dict(self._held)

    def waiting(self) -> dict[str, float]:
        """What waits: task id -> seconds since it was put."""
        now = self._clock()
        return {entry[2]: now - self._put_at[entry[2]] for heap in self._heaps.values() for entry in heap}

    def ages(self) -> dict[str, float]:
        """Owner -> seconds that the oldest of its waiting tasks has waited."""
        now, ages = self._clock(), dict[str, float]()
        held = {held.task.task_id for held in self._held.values()}
        missing = {owner for owner, heap in self._heaps.items() if heap}
        for task_id, put_at in self._put_at.items():  # in the order in which they were put
            if not missing:
                break
            owner = self._tasks[task_id].owner
            if owner in missing and task_id not in held:
                ages[owner] = now - put_at
                missing.remove(owner)
        return ages

    def __len__(self) -> int:
        """How many tasks wait."""
        return sum(len(heap) for heap in self._heaps.values())


def due_time(
    arrived: float, priority: int, deadline: float | None, *, ageing_s: float, deadline_lead_s: float
) -> float:
    """When a task is due, for the order within an owner.

    One step of priority is worth `ageing_s` of waiting: it overtakes what came up to that much earlier, and no more.
    A deadline makes it due `deadline_lead_s` before, if that is sooner.
    """
    due = arrived - priority * ageing_s
    return due if deadline is None else min(due, deadline - deadline_lead_s)
