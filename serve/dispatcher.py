"""Keeps the engine replicas busy, and the records tidy: one of these runs per endpoint.

Replicas take jobs from the database themselves. What they get from here are nudges: one `work()` call in flight for
each video that should be in progress. Serve scales replicas on calls in flight, so the number of nudges is the scaling:
as many as are needed to be done within `drain_s`. If this actor dies, Serve starts it again and nothing is lost,
because the queue is the database.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from magicid.errors import StorageError
from serve import clips
from serve.jobs import JobStore, TenantQueue
from serve.settings import ServeSettings

_log = logging.getLogger("magicid.serve")
POLL_S = 0.1
TIDY_S = 2.0


def nudges_wanted(open_jobs: int, job_s: float, settings: ServeSettings) -> int:
    """How many videos should be in progress at once.

    With n replicas of `max_batch` rows the queue takes open_jobs * job_s / (n * max_batch) seconds; n is the least that
    keeps this within `drain_s`, at least 1 and at most `max_replicas`.

    Args:
        job_s: how long a video takes in a full batch, as lately seen; 0 while that is not known.
    """
    if open_jobs == 0:
        return 0
    replicas = math.ceil(open_jobs * job_s / (settings.max_batch * settings.drain_s)) if job_s else 1
    replicas = min(max(replicas, 1, settings.min_replicas), settings.max_replicas)
    return min(open_jobs, replicas * settings.max_batch)


class Dispatcher:
    """Nudges, lapsed leases, retention and webhooks.

    Args:
        work: makes one `work()` call; its answer has `outcome` and `seconds`.
        deliver: sends the webhooks that are due.
        measure: tells the queues of the tenants.
    """

    def __init__(
        self,
        settings: ServeSettings,
        jobs: JobStore,
        work: Callable[[], Awaitable[dict[str, Any]]],
        deliver: Callable[[], object],
        measure: Callable[[Sequence[TenantQueue]], object] = lambda _: None,
    ) -> None:
        self.settings, self.jobs, self.work = settings, jobs, work
        chores = (self.reclaim, self.expire, deliver, lambda: measure(jobs.waiting_by_tenant()))
        self.chores = [functools.partial(asyncio.to_thread, chore) for chore in chores]
        self.in_flight: set[asyncio.Task[dict[str, Any]]] = set()
        self.job_s = 0.0

    async def run(self) -> None:
        """Until cancelled. A failure of one round is logged, and the next one tries again."""
        await asyncio.gather(self._rounds(self.nudge, POLL_S), *(self._rounds(each, TIDY_S) for each in self.chores))

    async def _rounds(self, one: Callable[[], Awaitable[object]], pause_s: float) -> None:
        while True:
            try:
                await one()
            except Exception:
                _log.exception("a round of the dispatcher failed; it goes on")
            await asyncio.sleep(pause_s)

    async def nudge(self) -> None:
        """Bring the calls in flight up to what the queue wants."""
        for task in [task for task in self.in_flight if task.done()]:
            self.in_flight.discard(task)
            self._learn(task)
        work = await asyncio.to_thread(self.jobs.open_work)
        wanted = nudges_wanted(work.queued + work.in_progress, self.job_s, self.settings)
        for _ in range(wanted - len(self.in_flight)):
            self.in_flight.add(asyncio.ensure_future(self.work()))

    def reclaim(self) -> None:
        """Jobs of lost workers go back to the queue."""
        for job in self.jobs.reclaim():
            told = {"job": job.id, "status": job.status, "attempt": job.attempt}
            _log.warning(
                "job %s lost its worker: now %s, attempt %d",
                *told.values(),
                extra=told | {"request_id": job.request_id},
            )

    def expire(self) -> None:
        """Videos past their time are removed: first the file, so that none is left that no record names."""
        gone = []
        for job in self.jobs.expired():
            try:
                clips.remove_all(self.settings.clips_location, job)
                gone.append(job.id)
            except StorageError as error:
                _log.warning("video %s is past its time and stays: %s", job.id, error)
        self.jobs.forget(gone)

    def _learn(self, task: asyncio.Task[dict[str, Any]]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:  # the replica died; its jobs come back when their leases lapse
            _log.warning("a replica was lost: %s", type(error).__name__)
        elif task.result()["outcome"] == "completed":
            seconds = float(task.result()["seconds"])
            self.job_s = seconds if not self.job_s else 0.8 * self.job_s + 0.2 * seconds
