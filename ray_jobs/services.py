"""What all coroutines of a job share, as one value: the queues, and whoever works for them.

`on_ray` makes the real ones. A simulation hands in its own (simulation.py); everything above stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from magicid.errors import MagicIDError
from magicid.manifests import ManifestRow
from magicid.recipe import Recipe
from magicid.run import Run
from magicid.schema import Identity
from ray_jobs import pools, work
from ray_jobs.metrics import FleetMetrics
from ray_jobs.pipeline import Pipeline
from ray_jobs.queue import Held
from ray_jobs.tasks import RayTasks, Tasks


class Intake(Protocol):
    """Checks photos; `intake.Intake` is one.

    Attributes:
        following: those who are likely to be asked for next, at most so many, who may be checked ahead.
    """

    problem: MagicIDError | None
    following: Callable[[int], list[ManifestRow]]

    async def check(self, row: ManifestRow) -> Identity:
        """One identity, checked now or earlier."""

    async def forget(self, identity_id: str) -> None:
        """Remove what was found ahead of somebody whose turn does not come."""


class Slots(Protocol):
    """Trains what is in the queue; `slots.Slots` is one."""

    def adjust(self, waiting: int, held: dict[str, Held]) -> str:
        """Be as many as there is work for; returns what went wrong since the last call."""

    def join(self) -> None:
        """Wait for those that were sent home."""


@dataclass(frozen=True)
class Services:
    """
    Attributes:
        work: handle of an actor of the class `work.Work`.
        metrics: a `metrics.FleetMetrics`.
        together: whether pools and slots fit the machines at the same time.
        clock: Unix seconds, for what people see: arrivals and ends.
    """

    work: Any
    pipeline: Pipeline
    slots: Slots
    intake: Intake
    tasks: Tasks
    metrics: Any
    together: bool
    clock: Callable[[], float] = time.time


def on_ray(recipe: Recipe, run: Run, job: str) -> Services:
    """Start the services on the Ray cluster that is connected; needs a running event loop.

    Args:
        job: name of this start of the job.
    """
    from ray_jobs.intake import Intake as RayIntake
    from ray_jobs.passes import Passes
    from ray_jobs.slots import Slots as RaySlots

    name, handle = work.start(recipe)
    return Services(
        work=handle,
        pipeline=Pipeline(run, handle, Passes(recipe, run, job, (name, handle))),
        slots=RaySlots(recipe, run, (name, handle)),
        intake=RayIntake(recipe, run, job),
        tasks=RayTasks(),
        metrics=FleetMetrics(recipe),
        together=pools.together(recipe, ray.cluster_resources()),
    )
