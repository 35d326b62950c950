"""The loop of a job: begins who is admitted, and watches queues, slots and pools until nobody is left."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import ray.exceptions

from magicid import ledger
from magicid.errors import MagicIDError
from magicid.manifests import ManifestRow
from ray_jobs.arrivals import Arrivals
from ray_jobs.fleet import SHOWN_EACH, Fleet
from ray_jobs.job import cause
from ray_jobs.metrics import ADMISSION
from ray_jobs.work import CLIPS, TRAINING, View

WATCH_S, WATCH_S_AT_MOST = 0.5, 20.0  # how often queues, slots and pools are looked at, if nothing ends before
WATCHED_EACH_S = 200  # so many identities are worth a second between two looks: each costs the same, however many


class Driver:
    """One run from its manifest to its end.

    Args:
        customize: one identity from its manifest row to its adapter; returns the published version.
    """

    def __init__(self, fleet: Fleet, customize: Callable[[Fleet, ManifestRow], Awaitable[str]]) -> None:
        self.fleet, self.ledger, self._customize = fleet, fleet.ledger, customize
        self._ways: dict[str, asyncio.Task[None]] = {}
        self.arrivals = Arrivals(fleet, self._ways)
        self._driving, self._looked = False, 0.0
        self._idle_since: dict[str, float] = {}
        self._sent_home: dict[str, bool] = {}
        self._noted: dict[str, dict[str, Any]] = {}  # what each training said last
        self._told: MagicIDError | None = None

    async def run(self, manifest: str) -> None:
        """Customise every identity of a manifest, and those that are added to it meanwhile.

        Raises:
            ManifestError: it cannot be read at the start.
            LeaseError: another driver has taken the run.
            MagicIDError: nothing can be checked, generated or trained: models that cannot be loaded.
        """
        await self._look(manifest, first=True)
        self.arrivals.end_absent()
        self._driving = True
        try:
            while self._ways or len(self.arrivals.admission):
                self.fleet.lease.check()
                self._admit()
                await self._watch()
                if _now() - self._looked > self.fleet.recipe.fleet.manifest_s:
                    await self._look(manifest)
        finally:
            self._driving = False
            for way in self._ways.values():
                way.cancel()
            self.fleet.work.send_home.remote(TRAINING, True)
            self.fleet.traces.close()
        await asyncio.to_thread(self.fleet.pipeline.stop)
        await asyncio.to_thread(self.fleet.slots.join)
        await self.arrivals.sweep(all_of_them=True)  # now nobody has anything in hand

    async def _look(self, manifest: str, first: bool = False) -> None:
        self._looked = _now()
        await self.arrivals.look(manifest, first)

    def _admit(self) -> None:
        while (row := self.arrivals.next()) is not None:
            self._ways[row.id] = asyncio.create_task(self._way(row))

    async def _way(self, row: ManifestRow) -> None:
        """One identity, with whatever happens to it kept in the ledger."""
        self.fleet.traces.begin(row.id, row.owner)
        try:
            version = await self._customize(self.fleet, row)
            if self.ledger.records[row.id].state != ledger.DONE:
                self.fleet.end(row.id, state=ledger.DONE, stage="publish", adapter=version)
        except MagicIDError as error:
            self.fleet.failed(row.id, error)
        except ray.exceptions.RayActorError:
            pass  # the queues are gone, and the loop that watches them ends this start
        except Exception as error:
            self.fleet.failed(row.id, MagicIDError(cause(error), "submit again to try it again"))
        finally:
            self.arrivals.admission.finish(row.id)
            self._ways.pop(row.id, None)
            if self._driving:  # thousands who are done already end no work that would wake the loop
                self._admit()
            if (record := self.ledger.records.get(row.id)) is not None:
                problem = record.problem if record.state == ledger.FAILED else None
                self.fleet.traces.end(row.id, record.state, problem, record.adapter)

    async def _watch(self) -> None:
        """Look at both queues: who ended, how far the others are, and whether machines can be given back.

        Waits until somebody ends, but not long.
        """
        fleet = self.fleet
        wait_s = min(WATCH_S_AT_MOST, max(WATCH_S, len(self.arrivals.rows) / WATCHED_EACH_S))
        view: View = await fleet.work.news.remote(wait_s)
        if problem := fleet.pipeline.problem or fleet.intake.problem:
            raise problem
        for ended in view.ended[TRAINING]:
            fleet.trained(ended)
        for ended in view.ended[CLIPS]:
            fleet.pipeline.gave_up(ended)
        for held in view.held[TRAINING].values():
            if self._noted.get(held.task.task_id) != held.note:  # most have nothing new between two looks
                identity_id, stage = held.task.task_id.rsplit("/", 1)
                step, metrics = held.note.get("step", 0), held.note.get("metrics", {})
                fleet.progress(identity_id, stage, step, held.task.cost, metrics)
        self._noted = {held.task.task_id: held.note for held in view.held[TRAINING].values()}
        if lost := fleet.slots.adjust(view.waiting[TRAINING], view.held[TRAINING]):
            fleet.display.say(f"a training slot ended: {lost.splitlines()[0]}", "yellow")
        self._send_home(TRAINING, idle=not view.waiting[TRAINING] and not view.held[TRAINING])
        self._send_home(CLIPS, idle=not fleet.pipeline.open_blocks)
        if self.ledger.problem and self.ledger.problem is not self._told:
            self._told = self.ledger.problem
            fleet.display.say(f"the ledger could not be written and is tried again: {self._told}", "yellow")
        self._report(view)
        self._show_all()

    def _send_home(self, queue: str, idle: bool) -> None:
        """Let workers give their machines back after a while without work, and keep them when there is some again."""
        since = self._idle_since.setdefault(queue, _now())
        if not idle:
            self._idle_since[queue] = _now()
        patience = self.fleet.recipe.fleet.slot_idle_s if self.fleet.together else 0.0
        home, was = idle and _now() - since >= patience, self._sent_home.get(queue, False)
        if home or was:
            self.fleet.work.send_home.remote(queue, home)
        self._sent_home[queue] = home

    def _report(self, view: View) -> None:
        """Figures for Prometheus."""
        self.fleet.metrics.training(len(view.held[TRAINING]))
        if self.fleet.metrics.due:
            queues = {name: (view.waiting[name], view.in_hand[name], view.ages[name]) for name in (TRAINING, CLIPS)}
            waits = self.arrivals.admission
            admission = (len(waits), len(waits.held()), waits.ages())
            found = (self.ledger.records[name] for name in self._ways if name in self.ledger.records)
            stages = Counter(record.stage for record in found)
            self.fleet.metrics.report(self.ledger.states, stages, {**queues, ADMISSION: admission})

    def _show_all(self) -> None:
        if len(self.ledger.records) > SHOWN_EACH:
            stages = Counter(self.ledger.records[name].stage for name in self._ways if name in self.ledger.records)
            note = ", ".join(f"{count} in {stage}" for stage, count in stages.items() if stage)
            ended = sum(self.ledger.states[state] for state in (ledger.DONE, ledger.FAILED, ledger.CANCELLED))
            self.fleet.display.show("identities", ended, len(self.ledger.records), note)


def _now() -> float:
    """Seconds on the event loop's clock, which never goes back."""
    return asyncio.get_running_loop().time()
