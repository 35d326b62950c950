"""The fleet without models: the job's own code on a clock that jumps, over GPUs that exist as numbers.

Real, the very code that a cluster runs: `customize_person`, the driver with its admission, both fair queues behind
their one address, `Pipeline`, the ledger and its files, the lease, the manifest, commands and deletions.

Simulated: whatever a Ray worker computes. A generator, a reward, the check of photos, a training step, the selection
and the publication are sleeps of a given length; a slot leaves a small file where it would leave an adapter. Ray is not
there at all: neither the time that its calls take, nor what Ray Data's scheduler costs the driver for every block, nor
its exporter of figures, nor machines that fail, which the tests with real processes cover. The pools have the sizes
that the recipe names, and do not shrink.

Time: an event loop that jumps to its next timer when nothing is left to do, so that a week of a cluster takes minutes
and depends on nothing but the seed. What the job hands to threads runs in the loop, and time stands still meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console

from magicid import adapters, storage
from magicid.errors import MagicIDError
from magicid.lease import Lease
from magicid.ledger import Ledger
from magicid.manifests import ManifestRow
from magicid.prompts import load_prompts
from magicid.recipe import Pool, Recipe
from magicid.run import Run, clip_uri, training_uri
from magicid.schema import (
    MOVING_CLIP,
    STATIC_CLIP,
    STILL_CLIP,
    VALIDATION_CLIP,
    Clip,
    Identity,
    Made,
    ScoredClip,
    from_row,
    to_row,
)
from ray_jobs import keeping, tasks
from ray_jobs.customize import customize_person
from ray_jobs.driver import Driver
from ray_jobs.fleet import Fleet
from ray_jobs.pipeline import Pipeline
from ray_jobs.progress import Display
from ray_jobs.queue import Held, Task
from ray_jobs.services import Services
from ray_jobs.simulated_cluster import Cluster, Durations, Here, VirtualLoop
from ray_jobs.work import CLIPS, END, TRAINING, Work, queues

T = TypeVar("T")
PHOTOS = 10  # of each identity
EPOCH = 1_800_000_000.0  # Unix seconds at which a simulation begins
TELL_S = 100.0  # how often a slot tells its step


class SimulatedPools:
    """Generators and scorers. One coroutine for each generator; a block goes through the scorers by itself."""

    def __init__(self, cluster: Cluster, run: Run, work: Here, rows: bool) -> None:
        self.cluster, self.run, self.work, self.rows = cluster, run, work, rows
        resources, took = cluster.recipe.resources, cluster.durations
        self._scorers = [
            ("identity", _size(resources.identity), resources.identity.gpus, took.identity, False),
            ("motion", _size(resources.motion), resources.motion.gpus, took.motion, False),
            ("semantics", _size(resources.semantics), resources.semantics.gpus, took.semantics, False),
            ("measure", _size(resources.identity), resources.identity.gpus, took.measure, True),
        ]
        self._places = {name: asyncio.Semaphore(size) for name, size, *_ in self._scorers}
        self._seen: set[tuple[str, str | None, str]] = set()
        self._there: set[str] = set()
        self.made_twice: list[str] = []
        self._ahead: asyncio.Queue[Task] = asyncio.Queue()
        self._pipeline: Pipeline | None = None
        self._running: set[asyncio.Task[Any]] = set()

    def begin(self, pipeline: Pipeline) -> None:
        """Something is wanted."""
        if self._pipeline is None:
            self._pipeline = pipeline
            self._start(self._source())
            for _ in range(_size(self.cluster.recipe.resources.generator)):
                self._start(self._generator(pipeline))

    def stop(self) -> None:
        """End."""
        for task in self._running:
            task.cancel()

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = self.cluster.start(coroutine)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _source(self) -> None:
        for ticket in itertools.count():
            task = await self.work.take(CLIPS, f"ticket-{ticket}")
            while isinstance(task, str):  # END: models stay, as if the next ticket came at once
                await self.work.change()
                task = await self.work.take(CLIPS, f"ticket-{ticket}")
            self._ahead.put_nowait(task)

    async def _generator(self, pipeline: Pipeline) -> None:
        took, gpus = self.cluster.durations, self.cluster.recipe.resources.generator.gpus
        photo = dict.fromkeys((STATIC_CLIP, MOVING_CLIP, STILL_CLIP), took.photo_clip)
        each = {**photo, VALIDATION_CLIP: took.validation_clip}
        await asyncio.sleep(took.load)
        while True:
            task = await self._ahead.get()
            clips = [from_row(Clip, row) for row in task.payload["clips"]]
            seconds = 0.0
            for clip in clips:
                key = (clip.kind, clip.identity_id, clip.clip_id)
                if key in self._seen:
                    self.made_twice.append(clip.clip_id)
                self._seen.add(key)
                # the base model's held-out clips are made for the first and found by all others
                seconds += took.found_clip if clip.clip_id in self._there else each.get(clip.kind, took.clip)
                self._there.add(clip.clip_id)
            spent = await self.cluster.work("generator", task.owner, gpus, seconds)
            self._start(self._score(pipeline, task.owner, clips, {"GenerateClips": spent / len(clips)}))

    async def _score(self, pipeline: Pipeline, owner: str, clips: list[Clip], spent: dict[str, float]) -> None:
        measured = keeping.is_measured(clips[0])
        asked = [clip for clip in clips if clip.kind not in (MOVING_CLIP, STILL_CLIP)]  # of copies nothing is
        rewarded = dict(spent)
        for name, _, gpus, seconds, metrics in self._scorers:
            if metrics == measured and asked:
                async with self._places[name]:
                    took = await self.cluster.work(name, owner, gpus, seconds * len(asked))
                rewarded[name] = took / len(asked)
        uris = [clip_uri(clip.clip_id, ".safetensors") for clip in clips]
        if self.rows:
            rows = [{**to_row(clip), "latents_uri": uri, "text_uri": "text"} for clip, uri in zip(clips, uris)]
            made = keeping.keep(self.run, [keeping.Finished(from_row(ScoredClip, row)) for row in rows])
        else:
            made = [
                Made(
                    clip.clip_id, clip.kind, clip.identity_id, uri, "text", seconds=rewarded if clip in asked else spent
                )
                for clip, uri in zip(clips, uris)
            ]
        self.cluster.call("driver", pipeline.received, made)


class SimulatedSlots:
    """Training slots: as many as there is work for, up to the recipe's number."""

    def __init__(self, cluster: Cluster, run: Run, work: Here) -> None:
        self.cluster, self.run, self.work = cluster, run, work
        self._running: set[asyncio.Task[Any]] = set()
        self._numbers = itertools.count()
        self.trained: list[str] = []

    def adjust(self, waiting: int, held: dict[str, Held]) -> str:
        """Start what is missing."""
        for _ in range(min(self.cluster.recipe.resources.slots, waiting + len(held)) - len(self._running)):
            task = self.cluster.start(self._slot(f"slot-{next(self._numbers)}"))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return ""

    def join(self) -> None:
        """Nothing to wait for."""
        for task in self._running:
            task.cancel()

    async def _slot(self, name: str) -> None:
        await asyncio.sleep(self.cluster.durations.load)
        while (task := await self.work.take(TRAINING, name)) != END:
            assert isinstance(task, Task)
            if await self._train(name, task):
                identity_id, stage = task.task_id.rsplit("/", 1)
                uri = training_uri(identity_id, stage, adapters.WEIGHTS_NAME)
                sha256 = storage.write_bytes(self.run.path(uri), task.task_id.encode())
                self.trained.append(task.task_id)
                self.work.do("call", TRAINING, "done", name, {"sha256": sha256})

    async def _train(self, name: str, task: Task) -> bool:
        """One task; False: it was cancelled on the way."""
        resources, took = self.cluster.recipe.resources, self.cluster.durations
        gpus = resources.workers_per_slot * resources.worker_gpus
        stage = str(task.payload["stage"])
        step_s = took.sft_step if stage == "sft" else took.hpo_step
        done, at_once = 0.0, max(1.0, TELL_S // step_s)
        while done < task.cost:
            steps = min(at_once, task.cost - done)
            await self.cluster.work(stage, task.owner, gpus, steps * step_s)
            done += steps
            if not self.work.do("call", TRAINING, "progress", name, task.task_id, {"step": done, "metrics": {}}):
                return False
        return True


class SimulatedIntake:
    """Everybody has PHOTOS good ones."""

    problem: MagicIDError | None = None

    def __init__(self, cluster: Cluster, photos: int = PHOTOS) -> None:
        self.cluster, self.photos = cluster, photos
        self.following: Callable[[int], list[ManifestRow]] = lambda number: []  # nobody needs to be checked ahead

    async def check(self, row: ManifestRow) -> Identity:
        """The identity, a little later."""
        await asyncio.sleep(self.cluster.durations.check)
        photos = [f"identities/{row.id}/photo-{number}.png" for number in range(self.photos)]
        return Identity(row.id, row.owner, photos, row.class_word, row.consent, row.priority, dict(row.overrides))

    async def forget(self, identity_id: str) -> None:
        """Nobody is checked ahead."""


class SimulatedTasks:
    """Pairs are always found; a published adapter is its manifest's name."""

    def __init__(self, cluster: Cluster, run: Run) -> None:
        self.cluster, self.run = cluster, run
        self.published: list[str] = []

    async def run_far(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function would return."""
        await asyncio.sleep(self.cluster.durations.task)
        if function is tasks.choose_pairs:
            return tasks.Chosen(Counter(P_id=100, P_dy=100), "a person nods")
        if function is tasks.publish:
            _, _, _, identity_id, _, hpo, _ = arguments
            storage.write_json(self.run.path("adapters", identity_id, hpo.sha256[:12], "manifest.json"), {})
            self.published.append(identity_id)
            return hpo.sha256[:12]
        return function(*arguments)


class _RunFar:
    def __init__(self, simulated: SimulatedTasks) -> None:
        self._simulated = simulated

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        return await self._simulated.cluster.start(self._simulated.run_far(function, *arguments))


class NoMetrics:
    """Ray's exporter is not there."""

    due = False

    def spent(self, identity_id: str | None, seconds: Mapping[str, float]) -> None:
        """Nothing."""

    def tried(self, stage: str, attempts: int) -> None:
        """Nothing."""

    def training(self, held: int) -> None:
        """Nothing."""


@dataclass
class Outcome:
    """What a simulated run leaves. Times are simulated seconds, `cpu` is real.

    Attributes:
        ended: identity -> when it ended.
        cpu: real CPU seconds of the `driver`, the `queues`' actor and the `far` side.
        open_until: owner -> until when it had identities that nobody had begun.
    """

    seconds: float
    cluster: Cluster
    ledger: Ledger
    published: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    made_twice: list[str] = field(default_factory=list)

    @property
    def cpu(self) -> dict[str, float]:
        """Real CPU seconds by process of a real job: `driver`, `queues`, `far`."""
        return self.cluster.cpu

    def busy(self, gpus: float, until_s: float | None = None) -> float:
        """Share of the GPU time that was worked, over the run or its beginning."""
        end = self.seconds if until_s is None else until_s
        return sum(work for ended, _, work in self.cluster.served if ended <= end) / (gpus * end)


def simulate(
    recipe: Recipe,
    manifest: str,
    out: str,
    *,
    durations: Durations | None = None,
    seed: int = 0,
    rows: bool = True,
    meanwhile: Callable[[Fleet, Run], Awaitable[None]] | None = None,
    lasts_s: float | None = None,
) -> Outcome:
    """Run a whole job, or go on with one.

    Args:
        out: the run directory.
        rows: whether the rows of clips are kept, as the pools do it, so that a run can be continued; they are most of
            the real time that a simulation takes.
        meanwhile: runs beside the job, on the same clock: somebody who sends commands or adds rows.
        lasts_s: after so long the driver is gone; None: it lives to the end.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_simulate(recipe, manifest, out, durations or Durations(), seed, rows, meanwhile, lasts_s))


async def _simulate(
    recipe: Recipe,
    manifest: str,
    out: str,
    durations: Durations,
    seed: int,
    rows: bool,
    meanwhile: Callable[[Fleet, Run], Awaitable[None]] | None,
    lasts_s: float | None,
) -> Outcome:
    loop, run, cluster = asyncio.get_running_loop(), Run(out), Cluster(recipe, durations, seed)
    lease = Lease.take(run, recipe.fleet.lease_s)
    ledger = Ledger(run, lease.fence, every_s=0, may_write=lease.check)
    fleet = Fleet(recipe, run, "0" * 64, Display(Console(quiet=True)), lease, ledger)
    fleet.prompts = load_prompts(recipe.prompts)
    work = Here(Work(queues(recipe, loop.time)), cluster)
    pools, slots, far = (
        SimulatedPools(cluster, run, work, rows),
        SimulatedSlots(cluster, run, work),
        SimulatedTasks(cluster, run),
    )
    fleet.connect(
        Services(
            work=work,
            pipeline=Pipeline(run, work, pools),
            slots=slots,
            intake=SimulatedIntake(cluster),
            tasks=_RunFar(far),
            metrics=NoMetrics(),
            together=True,
            clock=lambda: EPOCH + loop.time(),
        )
    )
    beside = [asyncio.create_task(_write_behind(ledger))]
    if meanwhile is not None:
        beside.append(asyncio.create_task(_always(meanwhile(fleet, run))))
    began = time.process_time()
    try:
        await asyncio.wait_for(Driver(fleet, customize_person).run(manifest), lasts_s)
    except TimeoutError:
        pools.stop()
        slots.join()
    finally:
        for task in beside:
            task.cancel()
        ledger.close()
        lease.release()
    cluster.cpu["driver"] = time.process_time() - began - cluster.cpu["far"] - cluster.cpu["queues"]  # all the rest
    return Outcome(loop.time(), cluster, ledger, far.published, slots.trained, pools.made_twice)


def overhead(recipe: Recipe, steps: int, at_once: int = 100) -> float:
    """Real CPU seconds that the simulation itself takes for so many `Cluster.steps`, with workers that do nothing: its
    loop, its clock, the reading of CPU time. A job has none of it; `Outcome.cpu` counts it as the driver's."""

    async def idle() -> float:
        cluster = Cluster(recipe, Durations(), 0)

        async def worker() -> None:
            for _ in range(steps // at_once):
                await cluster.work("", "", 0.0, 1.0)

        began = time.process_time()
        await asyncio.gather(*(cluster.start(worker()) for _ in range(at_once)))
        return time.process_time() - began - cluster.cpu["far"]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(idle())


async def _write_behind(ledger: Ledger) -> None:
    """What the ledger's thread does, on the simulated clock."""
    while True:
        await asyncio.sleep(ledger.pause_s)
        ledger.flush()


async def _always(coroutine: Awaitable[None]) -> None:
    await coroutine


def _size(pool: Pool) -> int:
    return max(pool.min_size, pool.max_size)
