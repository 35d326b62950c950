"""Many identities on their way at once: admission, the services they share, and the loop that watches it all.

Each identity is one coroutine (`customize.py`), which reads like the method. What it awaits is served by long-lived
workers that all identities share: the clip pipeline, the training slots, the check of photos. So one identity trains
while the next is generated and a third is scored. Who may begin, and whose work comes next, is decided by fair queues.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray.exceptions

from magicid import adapters, commands, erasure, identities, ledger, manifests, storage
from magicid.errors import IdentityError, MagicIDError, RecipeError, TrainingError
from magicid.lease import Lease
from magicid.ledger import Ledger
from magicid.manifests import ManifestRow
from magicid.recipe import Recipe
from magicid.repository import AdapterRef
from magicid.run import Run, identity_uri, training_uri
from magicid.schema import Clip, Identity, Made, Prompt, Rejected, ScoredClip, to_row
from ray_jobs import tasks
from ray_jobs.job import cause
from ray_jobs.keeping import failure
from ray_jobs.metrics import ADMISSION, devices
from ray_jobs.progress import Display
from ray_jobs.queue import Ended, FairQueue, Task, due_time
from ray_jobs.services import Services
from ray_jobs.tracing import Traces, provider
from ray_jobs.work import CLIPS, TRAINING, View

T = TypeVar("T")
WATCH_S, WATCH_S_AT_MOST = 0.5, 20.0  # how often queues, slots and pools are looked at, if nothing ends before
WATCHED_EACH_S = 200  # so many identities are worth a second between two looks: each costs the same, however many
# Short stages that the other kind of machine waits for. Behind the long ones of all who came before, slots would run
# out of people to train while generators are hours behind, and the other way round.
FIRST, FIRST_S = ("photo clips", "sft", "still clips"), 10 * 365 * 86400.0
NOTED = 0.01  # progress of a stage is noted in such parts
SHARED = "shared"  # owner of the clips that everybody waits for
_STEPS = ("sft", "sft.steps", "hpo", "hpo.steps")  # overrides that say how long an identity trains
SHOWN_EACH = 8  # up to so many identities have progress bars of their own


class Fleet:
    """What the coroutines of one job share.

    Args:
        customize: one identity from its manifest row to its adapter; returns the published version.
        book: the run's ledger, where it is not the usual one.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        base_sha256: str,
        display: Display,
        lease: Lease,
        customize: Callable[[Fleet, ManifestRow], Awaitable[str]],
        book: Ledger | None = None,
    ) -> None:
        self.recipe, self.run, self.base_sha256, self.display, self.lease = recipe, run, base_sha256, display, lease
        self.name = uuid.uuid4().hex[:12]
        self.prompts: list[Prompt] = []
        self.ledger = book or Ledger(run, lease.fence, may_write=lease.check)
        self.rejected: list[Rejected] = []
        self._clips_of: defaultdict[str, set[str]] = defaultdict(set)  # identity -> its clips among them
        self._customize = customize
        self._rows: dict[str, ManifestRow] = {}
        self._ways: dict[str, asyncio.Task[None]] = {}
        self._shared: dict[Any, asyncio.Task[Any]] = {}
        self._training: dict[str, asyncio.Future[Ended]] = {}
        self._admission = FairQueue(weights=recipe.fleet.weights, quotas=_under_way(recipe), max_held=_window(recipe))
        self._driving, self._looked, self._fingerprint = False, 0.0, ""
        self._devices = devices(recipe.resources)
        self._steps_of: dict[tuple[tuple[str, str], ...], float] = {}  # overrides that change them -> training steps
        self._idle_since: dict[str, float] = {}
        self._sent_home: dict[str, bool] = {}
        self._told: MagicIDError | None = None
        self._erased: set[str] = set()

    def connect(self, services: Services) -> None:
        """Take what the coroutines share."""
        self.work, self.pipeline, self.slots = services.work, services.pipeline, services.slots
        self.intake, self.tasks, self.metrics = services.intake, services.tasks, services.metrics
        self._together, self._clock = services.together, services.clock
        self.traces = Traces(self.run.location, provider())
        self.pipeline.spent = self._spent

    # ---- the loop ---------------------------------------------------------------------------------------------

    async def drive(self, manifest: str) -> None:
        """Customise every identity of a manifest, and those that are added to it meanwhile.

        Raises:
            ManifestError: it cannot be read at the start.
            LeaseError: another driver has taken the run.
            MagicIDError: nothing can be checked, generated or trained: models that cannot be loaded.
        """
        await self._look_for_people(manifest, first=True)
        self._end_absent()
        self._driving = True
        try:
            while self._ways or len(self._admission):
                self.lease.check()
                self._admit()
                await self._watch()
                if _now() - self._looked > self.recipe.fleet.manifest_s:
                    await self._look_for_people(manifest)
        finally:
            self._driving = False
            for way in self._ways.values():
                way.cancel()
            self.work.send_home.remote(TRAINING, True)
            self.traces.close()
        await asyncio.to_thread(self.pipeline.stop)
        await asyncio.to_thread(self.slots.join)

    async def _look_for_people(self, manifest: str, first: bool = False) -> None:
        """Take up new rows of the manifest, and what people asked for."""
        self._looked = _now()
        self._let_go(await asyncio.to_thread(erasure.erased, self.run.location))
        try:
            fingerprint = await asyncio.to_thread(manifests.fingerprint, manifest)
            if fingerprint != self._fingerprint:
                rows, unreadable = await asyncio.to_thread(manifests.read_manifest, manifest)
                self._fingerprint = fingerprint
                for bad in unreadable:
                    if bad not in self.rejected and erasure.tombstone(bad.name) not in self._erased:
                        self.set_aside(bad.kind, bad.name, MagicIDError(bad.problem, bad.action))
                for row in rows:
                    self._arrive(row)
        except MagicIDError as error:
            if first:
                raise
            self.display.say(f"the manifest cannot be read now, the job goes on: {error}", "yellow")
        for command in await asyncio.to_thread(lambda: list(commands.pending(self.run))):
            await self._obey(command)
            await asyncio.to_thread(storage.remove, command.location)

    def _arrive(self, row: ManifestRow) -> None:
        """A row of the manifest: somebody new, somebody known, a corrected row, or another person under a known id."""
        before = self._rows.get(row.id)
        if row == before:
            return
        if row.id in self._ways:  # what was begun is finished as it was begun, if it still may be
            self._still_agreed(row)
            return
        self._rows[row.id] = row
        if before is not None:
            self._admission.cancel(row.id)
        if erasure.tombstone(row.id) in self._erased:
            advice = "take the row out of the manifest, or give a new id"  # said, and kept nowhere
            self.display.say(f"{row.id} was deleted from this run: {advice}", "yellow")
            return
        content, known = _content(row), self.ledger.records.get(row.id)
        if known and known.row_sha256 not in ("", content) and known.adapter is not None:
            self.set_aside("identity", row.id, _changed(row, "its adapter was made"))
            return
        changes: dict[str, Any] = {}
        if not known or known.state not in (ledger.CANCELLED, ledger.DONE):
            changes = {"state": ledger.WAITING, "problem": None, "action": None, "ended": None, "failed_clips": 0}
        self.ledger.update(
            row.id, owner=row.owner, arrived=known.arrived if known else self._arrival(), priority=row.priority,
            deadline=row.deadline, row_sha256=known.row_sha256 if known and known.row_sha256 else content, **changes,
        )  # fmt: skip
        if not known or known.state != ledger.CANCELLED:
            self._admission.put(self._task(row))

    def _end_absent(self) -> None:
        """Those whom an earlier start left open and no row names any more: they would be waited for, for ever."""
        for record in [r for r in self.ledger.records.values() if r.state in (ledger.WAITING, ledger.RUNNING)]:
            if record.identity_id not in self._rows:
                gone = f"no usable row of the manifest names {record.identity_id} any more"
                self._failed(record.identity_id, MagicIDError(gone, "add the row again to go on"))

    def _still_agreed(self, row: ManifestRow) -> None:
        """Stop somebody under way whose row has lost its consent reference."""
        try:
            identities.check_consent(row, self.recipe.identities)
        except IdentityError as error:
            if self.ledger.records[row.id].state in (ledger.WAITING, ledger.RUNNING):
                self._rows[row.id] = row
                self._failed(row.id, error)
                self._ways[row.id].cancel()

    def _task(self, row: ManifestRow) -> Task:
        """An identity's place in the admission: its training is what it costs its owner, nothing if it is done."""
        changed = tuple((key, value) for key, value in row.overrides.items() if key in _STEPS)
        if changed not in self._steps_of:
            own = self.recipe
            with suppress(RecipeError):  # the check says what is wrong with it
                own = own.for_identity(dict(changed))
            self._steps_of[changed] = float(own.sft.steps + own.hpo.steps)
        done = self.ledger.records[row.id].state == ledger.DONE
        return Task(row.id, row.owner, 0.0 if done else self._steps_of[changed], self.due(row))

    def _arrival(self) -> float:
        """Now; rows that come together keep their order, so that who began first is finished first."""
        return self._clock() + len(self._rows) * 1e-6

    def _let_go(self, erased: set[str]) -> None:
        """Forget people who were deleted; what is under way for them stops."""
        new, self._erased = erased - self._erased, erased
        if not new:  # a tombstone is a hash: thousands of them are not made for nothing
            return
        for name in [name for name in self.ledger.records if erasure.tombstone(name) in new]:
            self._admission.cancel(name)
            if name in self._ways:
                self._ways[name].cancel()
            self.ledger.forget(name)
            about = [row for row in self.rejected if erasure.named(to_row(row), name, self._clips_of.get(name, set()))]
            self.rejected = [row for row in self.rejected if row not in about]
            self._clips_of.pop(name, None)

    async def _obey(self, command: commands.Command) -> None:
        name = command.identity_id
        record = self.ledger.records.get(name)
        if record is None:
            return
        if command.action == commands.CANCEL and record.state in (ledger.WAITING, ledger.RUNNING):
            self._admission.cancel(name)
            self._end(name, state=ledger.CANCELLED)
            if name in self._ways:
                self._ways[name].cancel()
            self.display.say(f"cancelled {name}", "yellow")
        if (
            command.action == commands.RETRY
            and record.state in (ledger.FAILED, ledger.CANCELLED)
            and name in self._rows
        ):
            await asyncio.to_thread(self._forget_tries, name)
            self.ledger.update(name, state=ledger.WAITING, problem=None, action=None, ended=None, failed_clips=0)
            self._admission.put(self._task(self._rows[name]))

    def _forget_tries(self, identity_id: str) -> None:
        """Let the tries of what failed begin anew."""
        rows = self.run.read_parts(f"scored/{identity_id}", ScoredClip)
        names = {clip.clip_id for clip in rows if failure(clip)}
        for file in storage.list_files(self.run.path("attempts", self.name), ".json"):
            key = file.rsplit("/", 1)[-1].removesuffix(".json")
            if key == f"identity-{identity_id}" or key.rsplit("-", 1)[-1] in names:
                storage.remove(file)

    def _admit(self) -> None:
        self._admission.ended()  # the ledger has it
        while (task := self._admission.take(uuid.uuid4().hex)) is not None:
            self._ways[task.task_id] = asyncio.create_task(self._way(self._rows[task.task_id]))

    async def _way(self, row: ManifestRow) -> None:
        """One identity, with whatever happens to it kept in the ledger."""
        self.traces.begin(row.id, row.owner)
        try:
            version = await self._customize(self, row)
            if self.ledger.records[row.id].state != ledger.DONE:
                self._end(row.id, state=ledger.DONE, stage="publish", adapter=version)
        except MagicIDError as error:
            self._failed(row.id, error)
        except ray.exceptions.RayActorError:
            pass  # the queues are gone, and the loop that watches them ends this start
        except Exception as error:
            self._failed(row.id, MagicIDError(cause(error), "submit again to try it again"))
        finally:
            self._admission.finish(row.id)
            self._ways.pop(row.id, None)
            if self._driving:  # thousands who are done already end no work that would wake the loop
                self._admit()
            if (record := self.ledger.records.get(row.id)) is not None:
                problem = record.problem if record.state == ledger.FAILED else None
                self.traces.end(row.id, record.state, problem, record.adapter)

    def _failed(self, identity_id: str, error: MagicIDError) -> None:
        self._end(identity_id, state=ledger.FAILED, problem=error.problem, action=error.action)
        self.set_aside("identity", identity_id, error)

    def _end(self, identity_id: str, **changes: Any) -> None:
        self.ledger.update(identity_id, ended=self._clock(), **changes)

    async def _watch(self) -> None:
        """Look at both queues: who ended, how far the others are, and whether machines can be given back.

        Waits until somebody ends, but not long.
        """
        wait_s = min(WATCH_S_AT_MOST, max(WATCH_S, len(self._rows) / WATCHED_EACH_S))
        view: View = await self.work.news.remote(wait_s)
        if problem := self.pipeline.problem or self.intake.problem:
            raise problem
        for ended in view.ended[TRAINING]:
            future = self._training.pop(ended.task_id, None)
            if future is not None and not future.done():
                future.set_result(ended)
        for ended in view.ended[CLIPS]:
            self.pipeline.gave_up(ended)
        for held in view.held[TRAINING].values():
            identity_id, stage = held.task.task_id.rsplit("/", 1)
            self.progress(identity_id, stage, held.note.get("step", 0), held.task.cost, held.note.get("metrics", {}))
        if lost := self.slots.adjust(view.waiting[TRAINING], view.held[TRAINING]):
            self.display.say(f"a training slot ended: {lost.splitlines()[0]}", "yellow")
        for queue, idle in (
            (TRAINING, not view.waiting[TRAINING] and not view.held[TRAINING]),
            (CLIPS, not self.pipeline.open_blocks),
        ):
            since = self._idle_since.setdefault(queue, _now())
            if not idle:
                self._idle_since[queue] = _now()
            patience = self.recipe.fleet.slot_idle_s if self._together else 0.0
            home, was = idle and _now() - since >= patience, self._sent_home.get(queue, False)
            if home or was:
                self.work.send_home.remote(queue, home)
            self._sent_home[queue] = home
        if self.ledger.problem and self.ledger.problem is not self._told:
            self._told = self.ledger.problem
            self.display.say(f"the ledger could not be written and is tried again: {self._told}", "yellow")
        self._report(view)
        self._show_all()

    def _report(self, view: View) -> None:
        """Figures for Prometheus."""
        self.metrics.training(len(view.held[TRAINING]))
        if self.metrics.due:
            queues = {name: (view.waiting[name], view.in_hand[name], view.ages[name]) for name in (TRAINING, CLIPS)}
            admission = (len(self._admission), len(self._admission.held()), self._admission.ages())
            found = (self.ledger.records[name] for name in self._ways if name in self.ledger.records)
            stages = Counter(record.stage for record in found)
            self.metrics.report(self.ledger.states, stages, {**queues, ADMISSION: admission})

    def _spent(self, made: Sequence[Made]) -> None:
        """Count what clips that came out of the pools have cost."""
        costs: dict[str | None, Counter[str]] = {}
        for clip in made:
            costs.setdefault(clip.identity_id, Counter()).update(clip.seconds)  # type: ignore[arg-type]  # floats add too
        for identity_id, seconds in costs.items():
            self.metrics.spent(identity_id, seconds)
            if identity_id is not None:
                gpus = self._devices
                self.ledger.add_seconds(identity_id, **{name: s * gpus.get(name, 1.0) for name, s in seconds.items()})
        self.metrics.tried("GenerateClips", sum(clip.attempts for clip in made))

    # ---- what one identity awaits -----------------------------------------------------------------------------

    def due(self, row: ManifestRow, stage: str = "") -> float:
        """When an identity is due, for the order within its owner; with the stage, when its work there is."""
        fleet = self.recipe.fleet
        due = due_time(
            self.ledger.records[row.id].arrived, row.priority, row.deadline,
            ageing_s=fleet.ageing_s, deadline_lead_s=fleet.deadline_lead_s,
        )  # fmt: skip
        return due - FIRST_S if stage in FIRST else due

    async def check(self, row: ManifestRow) -> Identity:
        """The checked identity of a row, whose consent is looked at however long ago its photos were.

        Raises:
            IdentityError: it cannot be used, or what is there was made from another row under the same id.
        """
        identities.check_consent(row, self.recipe.identities)
        content = _content(row)
        if self.ledger.records[row.id].row_sha256 != content:
            if await asyncio.to_thread(self.run.has, identity_uri(row.id)):
                raise _changed(row, "its photos were checked")
            self.ledger.update(row.id, row_sha256=content)
        return await self.intake.check(row)

    async def once(self, key: Any, make: Callable[[], Awaitable[T]]) -> T:
        """What is made once for all who ask under the same key; asked again after a failure, it is made again."""
        task = self._shared.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._shared[key] = asyncio.ensure_future(make())
        return await asyncio.shield(task)  # type: ignore[no-any-return]

    async def score(self, row: ManifestRow | None, stage: str, wanted: Sequence[Clip]) -> list[Made]:
        """Generate and score clips; those that were given up are set aside, the others are returned."""
        made = await self.pipeline.score(
            row.owner if row else SHARED,
            self.due(row, stage) if row else 0.0,
            wanted,
            self._shower(row, stage, len(wanted)),
        )
        failed = [clip for clip in made if clip.again is not None]
        for clip in failed:
            error = MagicIDError(str(clip.again), "the others go on; run again to try it again")
            self.set_aside("clip", clip.clip_id, error)
            if row:
                self._clips_of[row.id].add(clip.clip_id)
                self.ledger.update(row.id, problem=f"clip {clip.clip_id}: {clip.again}", action=error.action)
        if row and failed:
            self.ledger.update(row.id, failed_clips=self.ledger.records[row.id].failed_clips + len(failed))
        return [clip for clip in made if clip.error is None]

    async def measure(self, row: ManifestRow, wanted: Sequence[Clip]) -> list[Made]:
        """Generate and measure evaluation clips."""
        show = self._shower(row, "evaluation", len(wanted))
        return await self.pipeline.measure(row.owner, self.due(row), wanted, show)

    async def train(
        self, row: ManifestRow, person: Identity, stage: str, steps: int, examples: Sequence[dict[str, Any]] = ()
    ) -> AdapterRef:
        """Train one identity through one stage in a slot; returns the adapter.

        Args:
            examples: what SFT trains on; HPO reads its pairs from the run.

        Raises:
            TrainingError: it was given up; the reason is the last one.
        """
        uri = training_uri(person.identity_id, stage, adapters.WEIGHTS_NAME)
        sha256 = ""
        if not await asyncio.to_thread(self.run.has, uri):
            payload = {
                "identity_id": person.identity_id, "overrides": person.overrides, "stage": stage,
                "examples": list(examples),
            }  # fmt: skip
            task = Task(f"{person.identity_id}/{stage}", row.owner, float(steps), self.due(row, stage), payload)
            self.progress(row.id, stage, 0, steps)
            future = self._training[task.task_id] = asyncio.get_running_loop().create_future()
            self.work.put.remote(TRAINING, [task])
            try:
                ended: Ended = await future
            except asyncio.CancelledError:
                self.work.call.remote(TRAINING, "cancel", task.task_id)
                raise
            self._account(row.id, stage, ended)
            if ended.state != "done":
                raise TrainingError(f"{stage} failed: {ended.error}", "its last good checkpoint is kept; run again")
            sha256 = ended.result.get("sha256", "")
        self.progress(row.id, stage, steps, steps)
        return AdapterRef(uri, sha256 or await self.tasks.run(tasks.file_sha256, self.run.path(uri)))

    def _account(self, identity_id: str, stage: str, ended: Ended) -> None:
        record = self.ledger.records[identity_id]
        self.ledger.update(identity_id, attempts={**record.attempts, stage: float(ended.attempts)})
        resources = self.recipe.resources
        devices = resources.workers_per_slot * (resources.worker_gpus or 1.0)
        seconds = {stage: ended.seconds * devices}
        self.ledger.add_seconds(identity_id, **seconds)
        self.metrics.spent(identity_id, seconds)
        self.metrics.tried(stage, ended.attempts)
        self.traces.attempts(identity_id, stage, ended.attempts)

    def set_aside(self, kind: str, name: str, error: MagicIDError) -> None:
        """Report something that cannot be used, and go on."""
        self.rejected.append(Rejected(kind, name, error.problem, error.action))
        self.display.say(f"set aside {kind} {name}: {error}", "yellow")

    # ---- progress ---------------------------------------------------------------------------------------------

    def progress(
        self, identity_id: str, stage: str, done: float, total: float, metrics: dict[str, float] | None = None
    ) -> None:
        """Note how far an identity is."""
        record = self.ledger.records.get(identity_id)
        if record is None:  # deleted meanwhile
            return
        news = record.stage != stage or record.total != total or done in (0, total)
        if record.state in (ledger.WAITING, ledger.RUNNING) and (news or abs(done - record.done) >= NOTED * total):
            self.ledger.update(
                identity_id, state=ledger.RUNNING, stage=stage, done=float(done), total=float(total),
                began=record.began or self._clock(),
            )  # fmt: skip
            self.traces.stage(identity_id, stage)
        if len(self._rows) <= SHOWN_EACH and total > 1:
            note = "  ".join(f"{key} {value:.3g}" for key, value in (metrics or {}).items())
            self.display.show(f"{stage} {identity_id}", int(done), int(total), note)

    def _shower(self, row: ManifestRow | None, stage: str, total: int) -> Callable[[list[Made]], None]:
        """A callback for finished clips."""
        count = 0

        def show(made: list[Made]) -> None:
            nonlocal count
            count += len(made)
            if row is None:
                self.display.show(stage, count, total)
                return
            self.progress(row.id, stage, count, total)

        return show

    def _show_all(self) -> None:
        if len(self._rows) > SHOWN_EACH:
            stages = Counter(self.ledger.records[name].stage for name in self._ways if name in self.ledger.records)
            note = ", ".join(f"{count} in {stage}" for stage, count in stages.items() if stage)
            ended = sum(self.ledger.states[state] for state in (ledger.DONE, ledger.FAILED, ledger.CANCELLED))
            self.display.show("identities", ended, len(self.ledger.records), note)


def _content(row: ManifestRow) -> str:
    """Hash of what decides the adapter that a row leads to."""
    return storage.sha256_json([row.photos, row.owner, row.class_word, row.overrides])


def _changed(row: ManifestRow, since: str) -> IdentityError:
    return IdentityError(f"{row.id} is another row now than when {since}", "give the changed row a new id")


def _now() -> float:
    """Seconds on the event loop's clock, which never goes back."""
    return asyncio.get_running_loop().time()


def _window(recipe: Recipe) -> int:
    """Identities under way at once: each slot has one in hand and one or two that are made ready for it."""
    return recipe.fleet.window or 3 * recipe.resources.slots + 2


def _under_way(recipe: Recipe) -> dict[str, int]:
    """Identities under way at once of owners with a quota of training: the window's part for so many slots.

    With more, those who wait for their quota would fill the window, and slots that others could use would be idle.
    """
    window, slots = _window(recipe), recipe.resources.slots
    return {owner: max(quota + 2, window * quota // slots) for owner, quota in recipe.fleet.quotas.items()}
