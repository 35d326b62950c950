"""The one actor that workers ask for work: training slots and the clip pipeline take from it, the driver fills it.

It lives on the driver's node and dies with the driver: what it knows can be read again from storage.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from magicid.recipe import Recipe
from ray_jobs.queue import Ended, FairQueue, Held, Task

TRAINING, CLIPS = "training", "clips"
END = "end"  # instead of a task: the holder may go home


@dataclass(frozen=True)
class View:
    """What the driver sees of both queues at one moment; by queue name. Of what is held, payloads are left out."""

    ended: dict[str, list[Ended]] = field(default_factory=dict)
    held: dict[str, dict[str, Held]] = field(default_factory=dict)  # of training only
    in_hand: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    ages: dict[str, dict[str, float]] = field(default_factory=dict)  # owner -> seconds its oldest task has waited


class Work:
    """The queues behind one address. Every method is quick; waiting is done by those who ask."""

    def __init__(self, queues: dict[str, FairQueue]) -> None:
        self._queues = queues
        self._sent_home: dict[str, bool] = dict.fromkeys(queues, False)
        self._slots: set[str] = set()
        self._pass = ""
        self._news = asyncio.Event()

    def put(self, queue: str, tasks: list[Task]) -> None:
        """Add tasks."""
        for task in tasks:
            self._queues[queue].put(task)

    def take(self, queue: str, holder: str) -> Task | str | None:
        """A task; None: ask again; END: there is no more."""
        task = self._queues[queue].take(holder)
        self._tell(queue)  # the holder's last task may have been given up
        if task is not None and queue == TRAINING:
            self._slots.add(holder)
        return END if task is None and self._sent_home[queue] else task

    def begin_pass(self, name: str) -> None:
        """A new pass over the clip pools begins: what an earlier one holds waits again."""
        self._pass = name
        self._queues[CLIPS].release_all("the pass over its pools broke")

    def take_block(self, of: str, ticket: str) -> Task | str | None:
        """`take` of clips for a ticket of a pass. One that broke may go on asking for a while: it gets END."""
        return self.take(CLIPS, f"{of}-{ticket}") if of == self._pass else END

    def has_trained(self, slot: str) -> bool:
        """Whether a training slot has ever taken a task."""
        return slot in self._slots

    def send_home(self, queue: str, whether: bool) -> None:
        """Let those who find nothing to take go home, or wait."""
        self._sent_home[queue] = whether

    def call(self, queue: str, method: str, *arguments: Any, **named: Any) -> Any:
        """Any method of a queue."""
        result = getattr(self._queues[queue], method)(*arguments, **named)
        self._tell(queue)
        return result

    def _tell(self, queue: str) -> None:
        if self._queues[queue].has_ended:
            self._news.set()

    async def news(self, wait_s: float) -> View:
        """`view` as soon as anything has ended, or after `wait_s`."""
        timer = asyncio.get_running_loop().call_later(wait_s, self._news.set)
        await self._news.wait()
        timer.cancel()
        self._news.clear()
        return self.view()

    def view(self) -> View:
        """What ended since the last look, and how everything stands."""
        each = self._queues.items()
        return View(
            ended={name: queue.ended() for name, queue in each},
            held={TRAINING: {holder: _light(held) for holder, held in self._queues[TRAINING].held().items()}},
            in_hand={name: len(queue.held()) for name, queue in each},
            waiting={name: len(queue) for name, queue in each},
            ages={name: queue.ages() for name, queue in each},
        )


def _light(held: Held) -> Held:
    task = held.task
    return Held(Task(task.task_id, task.owner, task.cost, task.due), held.since, held.note)


def queues(recipe: Recipe, clock: Callable[[], float] | None = None) -> dict[str, FairQueue]:
    """Both queues with the recipe's shares and quotas. Few clips are handed out ahead: the queue keeps the order."""
    fleet, resources = recipe.fleet, recipe.resources
    on_clock: dict[str, Any] = {"clock": clock} if clock else {}
    generators = max(resources.generator.min_size, resources.generator.max_size)
    return {
        TRAINING: FairQueue(
            weights=fleet.weights, quotas=fleet.quotas, max_attempts=resources.max_failures + 1, **on_clock
        ),
        CLIPS: FairQueue(
            weights=fleet.weights, max_attempts=recipe.repository.attempts, max_held=2 * generators + 3, **on_clock
        ),
    }


def start(recipe: Recipe) -> tuple[str, Any]:
    """Start the actor beside the driver; its name, for the workers, and its handle."""
    name = f"magicid-work-{uuid.uuid4().hex[:8]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Work).options(name=name, num_cpus=0, scheduling_strategy=here)  # type: ignore[call-overload]
    return name, actor.remote(queues(recipe))
