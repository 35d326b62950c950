"""Wanted clips -> generated, scored and measured clips: one long pass of Ray Data that all identities share.

    TakeBlocks ─ GenerateClips ─ ScoreIdentity ─ ScoreMotion ─ ScoreSemantics ─ MeasureClips ─▶ scored/ evaluation/

The source is a queue: coroutines put clips into it whenever they want some, and the models stay loaded while identities
come and go. A pass ends when nothing is wanted for a while, which gives its machines back, and begins again with the
next clip. Each block of clips is on storage before anybody is told.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray

from magicid import schema
from magicid.errors import GenerationError, MagicIDError
from magicid.recipe import Recipe
from magicid.run import Run
from magicid.schema import Clip, MetricRow, ScoredClip, to_row, to_rows
from ray_jobs import pools, stages
from ray_jobs.job import cause
from ray_jobs.queue import Ended, Task
from ray_jobs.work import CLIPS

CLIPS_PER_BLOCK = 4  # clips that travel together; small, so that pools overlap and little is lost with a node
TICKETS = 512  # blocks of one pass; then the models are loaded again, which bounds what Ray Data remembers
PAUSE_S = 5  # after the first broken pass, longer after the next: a full disk may be seen to
BROKEN_PASSES = 3  # passes in a row that ended with an error and no clip before what is wanted is given up

Key = tuple[str, str, str]  # kind, identity or "", clip id: what is on its way through the pools
Row = TypeVar("Row", ScoredClip, MetricRow)


@dataclass
class _Request:
    """What one coroutine waits for: rows of one class, by clip id."""

    folder: str
    row_class: type
    future: asyncio.Future[None]
    missing: set[str]
    show: Callable[[Any], None]
    tasks: list[str] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)


class Pipeline:
    """Makes clips for many coroutines at once.

    Args:
        job: name of this start of the job, for the ledger of tries.
        work: name and handle of the queues' actor.
        spent: told of each clip that came out of the pools, with the seconds it took, in the loop's thread.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        job: str,
        work: tuple[str, Any],
        spent: Callable[[ScoredClip], None] = lambda clip: None,
    ) -> None:
        self.recipe, self.run, self.job, self._spent = recipe, run, job, spent
        self._work_name, self._work = work
        self._loop = asyncio.get_running_loop()
        self._blocks: dict[str, tuple[_Request, list[Clip]]] = {}  # task id -> who waits, and for what
        self._task_of: dict[Key, str] = {}
        self._numbers = itertools.count()
        self._lock, self._wanted, self._stop = threading.Lock(), threading.Event(), False
        self.problem: MagicIDError | None = None  # why no clip can be made, when none can
        self._thread = threading.Thread(target=self._passes, daemon=True)

    async def score(
        self, folder: str, owner: str, due: float, wanted: Sequence[Clip], show: Callable[[ScoredClip], None]
    ) -> list[ScoredClip]:
        """Generate and score clips; one row per wanted clip, finished earlier or now.

        A clip that was given up, or a model that failed on it, at an earlier start is tried again.

        Args:
            folder: where the rows are kept, relative to the run.
            show: told of each row as it comes, in the loop's thread.

        Raises:
            StorageError: a row could not be kept.
        """
        there = await asyncio.to_thread(self.run.read_parts, folder, ScoredClip)
        done = {name: clip for name, clip in best(there).items() if not failure(clip)}
        return await self._make(folder, ScoredClip, owner, due, wanted, done, show)

    async def measure(
        self, folder: str, owner: str, due: float, wanted: Sequence[Clip], show: Callable[[MetricRow], None]
    ) -> list[MetricRow]:
        """Generate clips and measure each against its one `identity_id`. Arguments and errors as for `score`."""
        there = await asyncio.to_thread(self.run.read_parts, folder, MetricRow)
        done = {row.clip_id: row for row in there if row.error is None}
        return await self._make(folder, MetricRow, owner, due, wanted, done, show)

    async def _make(
        self,
        folder: str,
        row_class: type[Row],
        owner: str,
        due: float,
        wanted: Sequence[Clip],
        done: dict[str, Row],
        show: Callable[[Any], None],
    ) -> list[Row]:
        missing = {clip.clip_id: clip for clip in wanted if clip.clip_id not in done}
        request = _Request(folder, row_class, self._loop.create_future(), set(missing), show)
        if missing:
            tasks = []
            with self._lock:
                for block in blocks(list(missing.values())):
                    name = f"{folder}#{next(self._numbers)}"
                    self._blocks[name] = (request, block)
                    self._task_of.update({_key(clip): name for clip in block})
                    request.tasks.append(name)
                    tasks.append(Task(name, owner, float(len(block)), due, {"clips": to_rows(block)}))
            self._work.put.remote(CLIPS, tasks)
            self._begin()
            try:
                await request.future
            except asyncio.CancelledError:
                for name in request.tasks:
                    self._work.call.remote(CLIPS, "cancel", name)
                raise
        rows = {**done, **request.rows}
        return [rows[clip.clip_id] for clip in wanted]

    def _begin(self) -> None:
        self._work.send_home.remote(CLIPS, False)
        self._wanted.set()
        if not self._thread.is_alive():
            self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether anybody waits for a clip."""
        return bool(self._blocks)

    def stop(self) -> None:
        """End the pass; what is in hand is finished."""
        self._stop = True
        self._work.send_home.remote(CLIPS, True)
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def gave_up(self, ended: Ended) -> None:
        """A block was given up by the queue: its clips become rows with the reason, the others go on."""
        found = self._blocks.get(ended.task_id)
        if ended.state == "failed" and found is not None:
            self._finish(ended.task_id, [self._failed(found[0], clip, str(ended.error)) for clip in found[1]])

    @staticmethod
    def _failed(request: _Request, clip: Clip, error: str) -> Any:
        if request.row_class is ScoredClip:
            return schema.from_row(ScoredClip, {**to_row(clip), "error": error})
        nothing = dict.fromkeys(field.name for field in dataclasses.fields(MetricRow))
        sizes = {"fps": 0, "frames": 0, "height": 0, "width": 0}
        return schema.from_row(MetricRow, {**nothing, **sizes, **to_row(clip), "error": error})

    # ---- the thread that runs Ray Data ------------------------------------------------------------------------

    def _passes(self) -> None:
        broken = 0
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stop:
                return
            while self._blocks and not self._stop:
                before = len(self._blocks)
                try:
                    self._pass()
                    broken = 0
                except Exception as error:
                    broken = broken + 1 if len(self._blocks) >= before else 1
                    if broken >= BROKEN_PASSES:
                        self.problem = GenerationError(
                            f"the pools cannot work: {cause(error)}",
                            "see the worker's log and `magicid check`, then run the same command again",
                        )
                        return
                    time.sleep(PAUSE_S * broken)
                ray.get(self._work.call.remote(CLIPS, "release_all", "the pass over its pools broke"))

    def _pass(self) -> None:
        """One execution over the pools, until its tickets are used up or nothing is wanted any more."""
        for batch in self._dataset().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            rows = stages.finished(batch)
            self._received([row for row in rows if row.clip.kind != stages.LAST.kind])
            if any(row.clip.kind == stages.LAST.kind for row in rows) and not self._blocks:
                return

    def _dataset(self) -> ray.data.Dataset:
        pools.configure()
        resources = self.recipe.resources
        arguments = {"recipe": self.recipe.model_dump(mode="json"), "run": self.run.location, "job": self.job}
        dataset: ray.data.Dataset = ray.data.from_items(list(range(TICKETS)), override_num_blocks=TICKETS)
        dataset = pools.add_source(dataset, stages.TakeBlocks, {"work": self._work_name})
        dataset = pools.add_stage(dataset, stages.GenerateClips, resources.generator, arguments)
        dataset = pools.add_stage(dataset, stages.ScoreIdentity, resources.identity, arguments)
        dataset = pools.add_stage(dataset, stages.ScoreMotion, resources.motion, arguments)
        dataset = pools.add_stage(dataset, stages.ScoreSemantics, resources.semantics, arguments)
        if self.recipe.evaluation.clips and self.recipe.evaluation.identity:
            dataset = pools.add_stage(dataset, stages.MeasureClips, resources.identity, arguments)
        return dataset

    def _received(self, rows: list[stages.Finished]) -> None:
        """Keep the rows of a block, then tell whoever waits. Rows that nobody waits for came twice, or too late."""
        by_task: dict[str, list[Any]] = {}
        for row in rows:
            self._loop.call_soon_threadsafe(self._spent, row.clip)
            name = self._task_of.get(_key(row.clip))
            if name in self._blocks:
                request = self._blocks[name][0]
                kept: Any = row.clip if request.row_class is ScoredClip else row.measured
                kept = kept or self._failed(request, row.clip, row.clip.error or "it was not measured")
                by_task.setdefault(name, []).append(kept)
        for name, made in by_task.items():
            self._finish(name, made)

    def _finish(self, task_id: str, rows: list[Any]) -> None:
        self._work.call.remote(CLIPS, "finish", task_id)
        with self._lock:
            request, block = self._blocks.pop(task_id)
            for clip in block:
                self._task_of.pop(_key(clip), None)
        try:
            self.run.append(request.folder, rows, request.row_class)
        except MagicIDError as error:
            self._loop.call_soon_threadsafe(_fail, request, error)
        else:
            self._loop.call_soon_threadsafe(_tell, request, rows)


def _tell(request: _Request, rows: list[Any]) -> None:
    for row in rows:
        request.rows[row.clip_id] = row
        request.missing.discard(row.clip_id)
        request.show(row)
    if not request.missing and not request.future.done():
        request.future.set_result(None)


def _fail(request: _Request, error: MagicIDError) -> None:
    if not request.future.done():
        request.future.set_exception(error)


def _key(clip: Clip) -> Key:
    return (clip.kind, clip.identity_id or "", clip.clip_id)


def failure(clip: ScoredClip) -> str | None:
    """Why a clip should be tried again at the next start; a clip without a face is as it is."""
    return clip.error or clip.motion_error or clip.semantics_error


def best(rows: Sequence[ScoredClip]) -> dict[str, ScoredClip]:
    """Each clip once: the row of a try that went well before that of one that failed. Parts have no order."""
    kept: dict[str, ScoredClip] = {}
    for row in rows:
        if row.clip_id not in kept or failure(kept[row.clip_id]):
            kept[row.clip_id] = row
    return kept


def blocks(clips: Sequence[Clip]) -> list[list[Clip]]:
    """The clips in blocks of at most CLIPS_PER_BLOCK, in order."""
    return [list(clips[first : first + CLIPS_PER_BLOCK]) for first in range(0, len(clips), CLIPS_PER_BLOCK)]
