"""A weighted-fair queue of training tasks, with leases and attempts. Plain Python; `slots.py` makes it an actor.

Between owners the one who has been served least goes first (stride scheduling: each task costs its steps, divided by
the owner's weight); within an owner, higher priority first, then the order of arrival. A slot holds at most one lease;
a slot that comes back after a crash gets its task again, until the attempts are used up.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """Train one identity through one stage (`sft` or `hpo`)."""

    task_id: str
    owner: str
    stage: str
    steps: int  # the cost that fairness counts
    priority: int = 0
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a task stands: `waiting`, `running`, `done` or `failed`; progress for the display."""

    state: str = "waiting"
    stage: str = ""
    attempts: int = 0
    step: int = 0
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    began_s: float | None = None  # Unix time of the first attempt
    ended_s: float | None = None


class FairQueue:
    """The queue; every method is quick.

    Args:
        max_attempts: tries of one task before it is failed with the reason that its worker died.
        weights: share of each owner, 1.0 where not given.
    """

    def __init__(self, tasks: list[Task], max_attempts: int = 3, weights: dict[str, float] | None = None) -> None:
        self._waiting = list(tasks)
        self._tasks = {task.task_id: task for task in tasks}
        self._outcomes = {task.task_id: Outcome(stage=task.stage, steps=task.steps) for task in tasks}
        self._leases: dict[str, str] = {}  # slot -> task id
        self._served = {task.owner: 0.0 for task in tasks}
        self._weights = weights or {}
        self._max_attempts = max_attempts

    def take(self, slot: str) -> Task | None:
        """The next task for a slot, or the one it already holds; None when nothing waits."""
        held = self._leases.get(slot)
        if held is not None:
            if self._outcomes[held].attempts < self._max_attempts:
                self._outcomes[held].attempts += 1
                return self._tasks[held]
            self.fail(slot, f"its worker died {self._max_attempts} times; see the worker's log")
        if not self._waiting:
            return None
        task = min(self._waiting, key=self._order)
        self._waiting.remove(task)
        self._served[task.owner] += task.steps / self._weights.get(task.owner, 1.0)
        self._leases[slot] = task.task_id
        outcome = self._outcomes[task.task_id]
        outcome.state, outcome.attempts = "running", outcome.attempts + 1
        outcome.began_s = outcome.began_s or time.time()
        return task

    def _order(self, task: Task) -> tuple[float, str, int, int]:
        return self._served[task.owner], task.owner, -task.priority, self._waiting.index(task)

    def progress(self, slot: str, step: int, metrics: dict[str, float]) -> None:
        """A slot tells how far its task is."""
        outcome = self._outcomes[self._leases[slot]]
        outcome.step, outcome.metrics = step, metrics

    def done(self, slot: str, result: dict[str, Any]) -> None:
        """A slot's task is finished."""
        outcome = self._outcomes[self._leases.pop(slot)]
        outcome.state, outcome.step, outcome.result = "done", outcome.steps, result
        outcome.ended_s = time.time()

    def fail(self, slot: str, error: str) -> None:
        """A slot's task cannot be finished; the reason is kept."""
        outcome = self._outcomes[self._leases.pop(slot)]
        outcome.state, outcome.error, outcome.ended_s = "failed", error, time.time()

    def release(self, slot: str, error: str) -> None:
        """A slot is gone for good: its task waits for another one, or fails when its attempts are used up."""
        if slot not in self._leases:
            return
        task_id = self._leases[slot]
        if self._outcomes[task_id].attempts >= self._max_attempts:
            self.fail(slot, error)
        else:
            del self._leases[slot]
            self._outcomes[task_id].state = "waiting"
            self._waiting.append(self._tasks[task_id])

    def fail_waiting(self, error: str) -> None:
        """Nothing that waits can be trained; the reason is kept."""
        for task in self._waiting:
            outcome = self._outcomes[task.task_id]
            outcome.state, outcome.error, outcome.ended_s = "failed", error, time.time()
        self._waiting = []

    def outcomes(self) -> dict[str, Outcome]:
        """How every task stands (copies)."""
        return {task_id: dataclasses.replace(outcome) for task_id, outcome in self._outcomes.items()}
