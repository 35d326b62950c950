"""Wanted clips -> generated, scored and measured clips, for many coroutines at once.

Coroutines put clips into the queue of clips whenever they want some, in small blocks; the pools (passes.py) take
blocks, write the finished rows to the run and tell what they made. Rows are on storage before anybody is told.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from magicid.errors import MagicIDError, StorageError
from magicid.run import Run, rows_folder
from magicid.schema import Clip, Made, MetricRow, ScoredClip, to_rows
from ray_jobs import keeping
from ray_jobs.keeping import failure
from ray_jobs.queue import Ended, Task
from ray_jobs.work import CLIPS

CLIPS_PER_BLOCK = 4  # clips that travel together; small, so that pools overlap and little is lost with a node

Key = tuple[str, str, str]  # kind, identity or "", clip id: what is on its way through the pools
Row = TypeVar("Row", ScoredClip, MetricRow)
Show = Callable[[list[Made]], None]


class Pools(Protocol):
    """Whoever works on the clips: takes blocks from the queue and calls `Pipeline.received`."""

    def begin(self, pipeline: Pipeline) -> None:
        """Something is wanted. Told again and again; never waits."""

    def stop(self) -> None:
        """Finish what is in hand and end."""


@dataclass
class _Request:
    """What one coroutine waits for, by clip id."""

    future: asyncio.Future[None]
    missing: set[str]
    show: Show
    tasks: list[str] = field(default_factory=list)
    made: dict[str, Made] = field(default_factory=dict)


class Pipeline:
    """Makes clips for many coroutines at once.

    Args:
        work: handle of the queues' actor.
        pools: who makes them.

    Attributes:
        problem: why no clip can be made, when none can.
        spent: told of clips that came out of the pools, whoever waits for them, in the loop's thread.
    """

    def __init__(self, run: Run, work: Any, pools: Pools) -> None:
        self.run, self._work, self._pools = run, work, pools
        self.spent: Show = lambda made: None
        self._loop = asyncio.get_running_loop()
        self._blocks: dict[str, tuple[_Request, list[Clip]]] = {}  # task id -> who waits, and for what
        self._task_of: dict[Key, str] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.problem: MagicIDError | None = None

    async def score(self, owner: str, due: float, wanted: Sequence[Clip], show: Show) -> list[Made]:
        """Generate and score clips of one folder of rows; what was made, now or earlier, in the order of `wanted`.

        A clip that was given up, or a model that failed on it, at an earlier start is tried again.

        Args:
            show: told of the clips of each block as it comes, in the loop's thread.

        Raises:
            StorageError: a row could not be kept.
        """
        there = await asyncio.to_thread(self._kept, wanted, ScoredClip)
        done = {name: _earlier(clip) for name, clip in best(there).items() if not failure(clip)}
        return await self._make(owner, due, wanted, done, show)

    async def measure(self, owner: str, due: float, wanted: Sequence[Clip], show: Show) -> list[Made]:
        """Generate clips and measure each against its one `identity_id`. Arguments and errors as for `score`."""
        there = await asyncio.to_thread(self._kept, wanted, MetricRow)
        found = {row.clip_id for row in there if row.error is None}
        done = {clip.clip_id: _earlier(clip) for clip in wanted if clip.clip_id in found}
        return await self._make(owner, due, wanted, done, show)

    def _kept(self, wanted: Sequence[Clip], row_class: type[Row]) -> list[Row]:
        large = ("embeddings", "video_features")
        return self.run.read_parts(rows_folder(wanted[0]), row_class, without=large) if wanted else []

    async def _make(
        self, owner: str, due: float, wanted: Sequence[Clip], done: dict[str, Made], show: Show
    ) -> list[Made]:
        missing = {clip.clip_id: clip for clip in wanted if clip.clip_id not in done}
        request = _Request(self._loop.create_future(), set(missing), show, made=done)
        if missing:
            tasks, folder = [], rows_folder(wanted[0])
            with self._lock:
                for block in blocks(list(missing.values())):
                    name = f"{folder}#{next(self._numbers)}"
                    self._blocks[name] = (request, block)
                    self._task_of.update({_key(clip): name for clip in block})
                    request.tasks.append(name)
                    tasks.append(Task(name, owner, float(len(block)), due, {"clips": to_rows(block)}))
            self._work.put.remote(CLIPS, tasks)
            self._pools.begin(self)
            try:
                await request.future
            except asyncio.CancelledError:
                for name in request.tasks:
                    if self._forget(name):
                        self._work.call.remote(CLIPS, "cancel", name)
                raise
        return [request.made[clip.clip_id] for clip in wanted]

    @property
    def open_blocks(self) -> int:
        """Blocks that somebody waits for."""
        return len(self._blocks)

    def in_hand(self, identity_id: str) -> list[str]:
        """Ids of the clips of one person that somebody waits for; not the base model's, which are everybody's."""
        with self._lock:
            blocks = [block for _, block in self._blocks.values()]
        return [
            clip.clip_id
            for block in blocks
            for clip in block
            if clip.identity_id == identity_id and clip.method != "base"
        ]

    def stop(self) -> None:
        """End the pools; what is in hand is finished."""
        self._pools.stop()

    def gave_up(self, ended: Ended) -> None:
        """A block was given up by the queue: its clips become rows with the reason, the others go on."""
        found = self._blocks.get(ended.task_id)
        if ended.state != "failed" or found is None:
            return
        rows = [keeping.given_up(clip, str(ended.error)) for clip in found[1]]
        try:
            self.received(keeping.keep(self.run, rows))
        except StorageError as error:
            if (request := self._forget(ended.task_id)) is not None and not request.future.done():
                request.future.set_exception(error)

    def received(self, rows: Sequence[Made]) -> None:
        """What the pools made, whoever calls, in any thread. What nobody waits for came twice, or too late."""
        by_task: dict[str, list[Made]] = {}
        self._loop.call_soon_threadsafe(self.spent, [row for row in rows if row.kind != keeping.LAST_KIND])
        for row in rows:
            name = self._task_of.get((row.kind, row.identity_id or "", row.clip_id))
            if name is not None:
                by_task.setdefault(name, []).append(row)
        for name, made in by_task.items():
            if not self._is_whole(name, made):
                continue  # of an earlier block, before a cancel: the block that waits now is made, or found, by itself
            if (request := self._forget(name)) is not None:
                self._work.call.remote(CLIPS, "finish", name)
                self._loop.call_soon_threadsafe(_tell, request, made)

    def _is_whole(self, task_id: str, made: Sequence[Made]) -> bool:
        with self._lock:
            _, block = self._blocks.get(task_id, (None, []))
        return {clip.clip_id for clip in block} <= {row.clip_id for row in made}

    def _forget(self, task_id: str) -> _Request | None:
        with self._lock:
            request, block = self._blocks.pop(task_id, (None, []))
            for clip in block:
                if self._task_of.get(_key(clip)) == task_id:
                    del self._task_of[_key(clip)]
        return request


def _tell(request: _Request, made: list[Made]) -> None:
    for row in made:
        request.made[row.clip_id] = row
        request.missing.discard(row.clip_id)
    request.show(made)
    if not request.missing and not request.future.done():
        request.future.set_result(None)


def _earlier(clip: Clip) -> Made:
    return Made(clip.clip_id, clip.kind, clip.identity_id, clip.latents_uri, clip.text_uri)


def _key(clip: Clip) -> Key:
    return (clip.kind, clip.identity_id or "", clip.clip_id)


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
