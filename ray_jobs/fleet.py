"""What the coroutines of one job share: services that do the work, and the accounts of what is done.

Each identity is one coroutine (`customize.py`), which reads like the method. What it awaits is served by long-lived
workers that all identities share: the clip pipeline, the training slots, the check of photos. So one identity trains
while the next is generated and a third is scored. Who may begin is decided by `arrivals.py`; `driver.py` runs it all.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from magicid import adapters, erasure, identities, ledger, storage
from magicid.errors import IdentityError, MagicIDError, TrainingError
from magicid.lease import Lease
from magicid.ledger import Ledger
from magicid.manifests import ManifestRow
from magicid.recipe import Recipe
from magicid.repository import AdapterRef
from magicid.run import Run, identity_uri, training_uri
from magicid.schema import Clip, Identity, Made, Prompt, Rejected, to_row
from ray_jobs import tasks
from ray_jobs.metrics import devices
from ray_jobs.progress import Display
from ray_jobs.queue import Ended, Task, due_time
from ray_jobs.services import Services
from ray_jobs.tracing import Traces, provider
from ray_jobs.work import TRAINING

T = TypeVar("T")
# Short stages that the other kind of machine waits for. Behind the long ones of all who came before, slots would run
# out of people to train while generators are hours behind, and the other way round.
FIRST, FIRST_S = ("photo clips", "sft", "still clips"), 10 * 365 * 86400.0
NOTED = 0.02  # progress of a stage is noted in such parts
SHARED = "shared"  # owner of the clips that everybody waits for
SHOWN_EACH = 8  # up to so many identities have progress bars of their own


class Fleet:
    """What the coroutines of one job share.

    Args:
        book: the run's ledger, where it is not the usual one.

    Attributes:
        rejected: what was set aside at this start, and why.
    """

    def __init__(
        self, recipe: Recipe, run: Run, base_sha256: str, display: Display, lease: Lease, book: Ledger | None = None
    ) -> None:
        self.recipe, self.run, self.base_sha256, self.display, self.lease = recipe, run, base_sha256, display, lease
        self.name = uuid.uuid4().hex[:12]
        self.prompts: list[Prompt] = []
        self.ledger = book or Ledger(run, lease.fence, may_write=lease.check)
        self.rejected: list[Rejected] = []
        self._clips_of: defaultdict[str, set[str]] = defaultdict(set)  # identity -> its clips among them
        self._shared: dict[Any, asyncio.Task[Any]] = {}
        self._training: dict[str, asyncio.Future[Ended]] = {}
        self._devices = devices(recipe.resources)

    def connect(self, services: Services) -> None:
        """Take what the coroutines share."""
        self.work, self.pipeline, self.slots = services.work, services.pipeline, services.slots
        self.intake, self.tasks, self.metrics = services.intake, services.tasks, services.metrics
        self.together, self.clock = services.together, services.clock
        self.traces = Traces(self.run.location, provider())
        self.pipeline.spent = self._spent

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
        try:
            identities.check_consent(row, self.recipe.identities)
        except IdentityError:
            await self.intake.forget(row.id)
            raise
        content = content_sha256(row)
        if self.ledger.records[row.id].row_sha256 != content:
            if await asyncio.to_thread(self.run.has, identity_uri(row.id)):
                raise another_row(row, "its photos were checked")
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

    def trained(self, ended: Ended) -> None:
        """Tell who waits for a training task that it has ended."""
        future = self._training.pop(ended.task_id, None)
        if future is not None and not future.done():
            future.set_result(ended)

    # ---- accounts ---------------------------------------------------------------------------------------------

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

    def set_aside(self, kind: str, name: str, error: MagicIDError) -> None:
        """Report something that cannot be used, and go on."""
        self.rejected.append(Rejected(kind, name, error.problem, error.action))
        self.display.say(f"set aside {kind} {name}: {error}", "yellow")

    def failed(self, identity_id: str, error: MagicIDError) -> None:
        """An identity cannot go on."""
        self.end(identity_id, state=ledger.FAILED, problem=error.problem, action=error.action)
        self.set_aside("identity", identity_id, error)

    def end(self, identity_id: str, **changes: Any) -> None:
        """An identity is where it stays."""
        self.ledger.update(identity_id, ended=self.clock(), **changes)

    def forget(self, identity_id: str) -> None:
        """Drop what is kept of a person who was deleted."""
        self.ledger.forget(identity_id)
        clips = self._clips_of.pop(identity_id, set())
        self.rejected = [row for row in self.rejected if not erasure.named(to_row(row), identity_id, clips)]

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
                began=record.began or self.clock(),
            )  # fmt: skip
            self.traces.stage(identity_id, stage)
        if len(self.ledger.records) <= SHOWN_EACH and total > 1:
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


def content_sha256(row: ManifestRow) -> str:
    """Hash of what decides the adapter that a row leads to."""
    decisive = [row.photos, row.owner, row.class_word, row.overrides]
    return storage.sha256_json([*decisive, row.captions] if any(row.captions) else decisive)


def another_row(row: ManifestRow, since: str) -> IdentityError:
    """Why a row is refused that is not the one it was."""
    return IdentityError(f"{row.id} is another row now than when {since}", "give the changed row a new id")
