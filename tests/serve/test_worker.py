"""One replica's work on a real engine and real records: claims, leases, fences, ends, and what breaks on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy.exc import OperationalError
from torch import Tensor

from magicid import adapters
from magicid.adapters import AdapterManifest
from magicid.backbones import load_backbone
from magicid.backbones.mixed_lora import LoraWeights
from magicid.errors import StorageError
from serve.adapter_cache import AdapterCache, load_adapter
from serve.database import Database
from serve.engine import Engine, Sample
from serve.jobs import EXHAUSTED, JobStore
from serve.schema import CANCELLED, COMPLETED, FAILED, IN_PROGRESS, QUEUED, Job, Target, VideoRequest
from serve.worker import Worker
from tests.backbones.test_adapters import trained_lora
from tests.tiny_models import tiny_hunyuan_folder, tiny_recipe

REQUEST = VideoRequest("a man jumps", 5, 32, 48, 8, 4, 6.0, 7)
LEASE_S = 0.8


class Paced(Engine):
    """An engine whose steps wait for leave; `break_with` is raised instead of the next one.

    A video of the seed `undecodable` ends the decoder's call, as one does that takes all memory.
    """

    undecodable: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.free, self.leave = threading.Event(), threading.Semaphore(0)
        self.break_with: Exception | None = None
        self.free.set()

    def step(self) -> list[Sample]:
        while not self.free.is_set() and not self.leave.acquire(timeout=0.02):
            continue
        if self.break_with is not None:
            raise self.break_with
        return super().step()

    def decode_all(self, finished: Sequence[tuple[Tensor, VideoRequest]]) -> list[np.ndarray]:
        if self.undecodable in [request.seed for _, request in finished]:
            raise RuntimeError("no memory for the decoder")
        return super().decode_all(finished)


class Clips:
    """Keeps frames in memory; `away` is raised where it is set, `gate` is waited for."""

    def __init__(self) -> None:
        self.kept: dict[str, np.ndarray] = {}
        self.away: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def write(self, job: Job, frames: np.ndarray) -> tuple[str, str]:
        self.gate.wait(20)
        if self.away is not None:
            raise self.away
        uri = f"{job.id}-{job.fence}.mp4"
        self.kept[uri] = frames
        return uri, "0" * 64

    def remove(self, uri: str) -> None:
        self.kept.pop(uri)


class Figures:
    """What the worker reports."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.batches: list[tuple[int, int]] = []
        self.swaps = 0

    def step(self, seconds: float, rows: int, identities: int, swaps: int) -> None:
        self.batches.append((rows, identities))
        self.swaps += swaps

    def ended(self, outcome: str, wait_s: float, run_s: float) -> None:
        self.outcomes.append(outcome)

    def cache(self, cache: AdapterCache) -> None:
        assert cache.stats.bytes > 0


class Bench:
    """Records, an engine with two published adapters, and one worker on them."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.recipe = tiny_recipe("hunyuan-480p", models)
        self.backbone = load_backbone(self.recipe)
        self.run = str(folder / "run")
        self.targets = [Target("base")]
        for seed, rank in ((0, 2), (1, 4)):
            _, state = trained_lora(self.recipe, seed=seed, rank=rank)
            manifest = AdapterManifest(
                self.backbone.base_sha256, "", rank=rank, alpha=self.recipe.lora.alpha, owner="t"
            )
            weights = adapters.to_bytes(state, rank, self.recipe.lora.alpha)
            ref = adapters.publish(self.run, f"person-{seed}", weights, manifest)
            self.targets.append(
                Target(f"base:person-{seed}", ref.identity_id, ref.version, location=ref.location, owner="t")
            )
        self.database = Database(f"sqlite:///{folder / 'records.sqlite'}")
        self.database.migrate()
        self.later = 0.0
        self.jobs = self.store(lambda: time.time())
        self.engine, self.clips, self.figures = Paced(self.backbone, max_batch=4), Clips(), Figures()
        self.worker = self.new_worker("one", self.jobs)

    def store(self, clock: Callable[[], float]) -> JobStore:
        return JobStore(self.database, lease_s=LEASE_S, max_attempts=3, retention_s=600, max_queued=100, clock=clock)

    def load(self, location: str) -> LoraWeights:
        return load_adapter(location, self.backbone.base_sha256, self.backbone.transformer)

    def new_worker(self, name: str, jobs: JobStore, cache_bytes: int = 1 << 30) -> Worker:
        cache = AdapterCache(lambda location: self.load(location), cache_bytes)
        return Worker(name, self.engine, cache, jobs, self.clips, self.figures, lease_s=LEASE_S)

    def make(self, person: int = 0, **changes: Any) -> Job:
        request = replace(REQUEST, **changes)
        key = f"{person} {time.monotonic_ns()}"
        return self.jobs.create("t", self.targets[person], request, request_id="req", dedupe_key=key, dedupe_s=1)[0]

    def take(self) -> Future[str]:
        future = self.worker.take()
        assert future is not None
        return future

    def record(self, job: Job) -> Job:
        return self.jobs.get(job.id, None)

    def stolen(self, job: Job) -> Job:
        """The job as another worker's: this one was silent for too long, as a stopped process is."""
        future = self.store(lambda: time.time() + 1000)
        assert [lost.id for lost in future.reclaim()] == [job.id]
        (theirs,) = future.claim("another")
        return theirs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan_folder(tmp_path_factory.mktemp("models") / "hunyuan")


@pytest.fixture
def bench(tmp_path: Path, models: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, models)
    made.worker.start()
    yield made
    made.engine.free.set()
    made.clips.gate.set()
    made.worker.stop()
    made.database.close()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- claims --------------------------------------------------------------------------------------------------------


def test_claimed_videos_are_those_of_their_own_adapters(bench: Bench) -> None:
    bench.engine.free.clear()
    made = [bench.make(person, seed=seed) for seed, person in enumerate((0, 1, 2, 1))]
    taken = [bench.take() for _ in made]
    assert bench.worker.take() is None, "nothing waits"
    assert [bench.record(job).status for job in made] == [IN_PROGRESS] * 4
    bench.engine.free.set()
    assert [future.result(30) for future in taken] == ["completed"] * 4
    plain = Engine(load_backbone(bench.recipe), max_batch=1)
    for job in made:
        record = bench.record(job)
        assert (record.status, record.progress, record.attempt, record.worker) == (COMPLETED, 100, 1, None)
        location = job.target.location
        lora = location and load_adapter(location, bench.backbone.base_sha256, bench.backbone.transformer)
        plain.admit(job.id, job.request, lora or None)
        (sample,) = [sample for _ in range(job.request.steps) for sample in plain.step()]
        assert sample.latents is not None
        shown = bench.clips.kept[str(record.video_uri)].astype(int)
        assert np.abs(shown - plain.decode(sample.latents, job.request)).max() <= 1
    assert max(bench.figures.batches) == (4, 3), "four videos of two people and the base in one step"
    assert bench.figures.outcomes == ["completed"] * 4


def test_progress_is_steps_done(bench: Bench) -> None:
    bench.engine.free.clear()
    job = bench.make()
    future = bench.take()
    for done in (25, 50, 75):
        bench.engine.leave.release()
        until(lambda done=done: bench.record(job).progress == done)
    bench.clips.gate.clear()
    bench.engine.free.set()
    until(lambda: bench.record(job).progress == 99)
    assert bench.record(job).status == IN_PROGRESS, "not before its clip is stored"
    bench.clips.gate.set()
    assert future.result(30) == "completed"


def test_leases_are_renewed_while_a_step_takes_longer_than_one(bench: Bench) -> None:
    bench.engine.free.clear()
    job = bench.make()
    future = bench.take()
    end = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < end:
        assert bench.jobs.reclaim() == []
        time.sleep(0.05)
    bench.engine.free.set()
    assert future.result(30) == "completed"
    assert bench.record(job).attempt == 1


def test_no_more_are_claimed_than_the_batch_takes(bench: Bench) -> None:
    bench.engine.free.clear()
    made = [bench.make(seed=seed) for seed in range(5)]
    taken = [bench.take() for _ in range(4)]
    assert bench.worker.take() is None, "its callers may have left, its rows are taken all the same"
    assert (bench.record(made[4]).status, bench.record(made[4]).attempt) == (QUEUED, 1)
    bench.engine.free.set()
    assert [future.result(30) for future in taken] == ["completed"] * 4
    assert bench.take().result(30) == "completed"


def test_a_video_that_finds_the_batch_full_goes_back_to_the_queue(bench: Bench) -> None:
    bench.engine.free.clear()
    for number in range(4):
        bench.engine.admit(f"other {number}", REQUEST, None)
    job = bench.make(1)
    assert bench.take().result(30) == "lost"
    assert (bench.record(job).status, bench.record(job).attempt) == (QUEUED, 2)
    with pytest.raises(ValueError, match="not in use"):
        bench.worker.cache.release(str(job.target.location))


# ---- fences --------------------------------------------------------------------------------------------------------


def test_a_video_that_went_to_another_is_dropped_and_its_record_left_alone(bench: Bench) -> None:
    bench.engine.free.clear()
    job = bench.make(1)
    future = bench.take()
    theirs = bench.stolen(job)
    assert future.result(30) == "lost"
    until(lambda: not bench.engine.progress())
    record = bench.record(job)
    assert (record.status, record.worker, record.attempt, record.fence) == (IN_PROGRESS, "another", 2, theirs.fence)
    assert bench.clips.kept == {}


def test_a_clip_of_an_old_claim_is_removed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.worker, "_try_beat", lambda: None)  # it hears of nothing until it writes
    bench.clips.gate.clear()
    job = bench.make()
    future = bench.take()
    until(lambda: not bench.engine.progress())
    theirs = bench.stolen(job)
    bench.clips.gate.set()
    assert future.result(30) == "lost"
    assert bench.clips.kept == {}
    assert bench.jobs.complete(job.id, theirs.fence, video_uri="theirs", video_sha256="0")
    assert bench.record(job).video_uri == "theirs"


@pytest.mark.parametrize("until_written", [False, True])
def test_a_lapsed_video_may_come_back_to_its_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, until_written: bool
) -> None:
    monkeypatch.setattr(bench.worker, "_try_beat", lambda: None)  # as while it was stopped
    (bench.clips.gate if until_written else bench.engine.free).clear()
    job = bench.make(1)
    first = bench.take()
    until(lambda: bool(bench.engine.progress()) != until_written)
    assert [lost.id for lost in bench.store(lambda: time.time() + 1000).reclaim()] == [job.id]
    second = bench.take()
    assert first.result(30) == "lost"
    bench.clips.gate.set()
    bench.engine.free.set()
    assert second.result(30) == "completed"
    record = bench.record(job)
    assert (record.status, record.attempt, record.fence) == (COMPLETED, 2, 2)
    assert list(bench.clips.kept) == [f"{job.id}-2.mp4"]
    with pytest.raises(ValueError, match="not in use"):
        bench.worker.cache.release(str(job.target.location))


def test_swaps_are_counted(bench: Bench) -> None:
    for person, swaps in ((1, 1), (1, 1), (2, 2), (0, 2), (2, 2), (1, 3)):  # the base model needs no copy
        bench.make(person)
        assert bench.take().result(30) == "completed"
        assert bench.figures.swaps == swaps


def test_a_video_cancelled_while_its_adapter_is_loaded_keeps_none_in_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, load = threading.Event(), bench.load

    def slow(location: str) -> LoraWeights:
        assert go.wait(30)
        return load(location)

    monkeypatch.setattr(bench, "load", slow)
    job = bench.make(1)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(bench.take)
        until(lambda: bench.record(job).status == IN_PROGRESS)
        bench.jobs.cancel(job.id, None)
        until(lambda: bench.figures.outcomes == [CANCELLED])
        go.set()
        assert taken.result(30).result(30) == CANCELLED
    assert bench.record(job).error_code == CANCELLED
    assert bench.worker.cache.resident() == {job.target.location}
    with pytest.raises(ValueError, match="not in use"):
        bench.worker.cache.release(str(job.target.location))
    assert bench.engine.progress() == {}


def test_a_cancelled_video_stops_at_the_next_step(bench: Bench) -> None:
    bench.engine.free.clear()
    job = bench.make(steps=1000)
    future = bench.take()
    bench.jobs.cancel(job.id, None)
    bench.engine.leave.release()
    assert future.result(30) == CANCELLED
    assert (bench.record(job).status, bench.record(job).error_code) == (FAILED, CANCELLED)
    assert bench.engine.progress() == {}


def test_a_caller_who_leaves_takes_nothing_along(bench: Bench) -> None:
    bench.engine.free.clear()
    job = bench.make()
    future = bench.take()
    assert not future.cancel()  # as asyncio does when the dispatcher dies
    bench.engine.free.set()
    assert future.result(30) == "completed"
    assert bench.record(job).status == COMPLETED


# ---- what breaks ---------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_damaged_fails_its_video_alone(bench: Bench) -> None:
    location = str(bench.targets[1].location)
    Path(location, adapters.WEIGHTS_NAME).write_bytes(b"broken")
    bad, good = bench.make(1), bench.make(2)
    outcomes = [bench.take().result(30) for _ in range(2)]
    assert outcomes == ["adapter_unusable", "completed"]
    assert (bench.record(bad).status, bench.record(bad).error_code) == (FAILED, "adapter_unusable")
    assert bench.record(bad).error_message == "", "what went wrong names folders"
    assert bench.record(good).status == COMPLETED


def test_an_adapter_that_cannot_be_loaded_here_is_tried_again_but_not_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(location: str) -> LoraWeights:
        raise torch.OutOfMemoryError("the device is full")

    job = bench.make(1)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "load", no_memory)
        for attempt in (1, 2, 3):
            assert bench.record(job).attempt == attempt
            assert bench.take().result(30) == "lost"
    record = bench.record(job)
    assert (record.status, record.error_code) == (FAILED, EXHAUSTED)
    assert bench.worker.failure is None
    bench.make(1)
    assert bench.take().result(30) == "completed"


def test_a_video_that_waits_for_memory_goes_back_when_its_worker_stops(bench: Bench) -> None:
    bench.engine.free.clear()
    bench.worker.stop()
    bench.worker = bench.new_worker("small", bench.jobs, cache_bytes=1)
    bench.worker.start()
    bench.make(1)
    held = bench.take()
    until(bench.engine.progress)
    waiting = bench.make(2)
    with ThreadPoolExecutor(2) as pool:
        taken = pool.submit(bench.take)
        until(lambda: bench.record(waiting).status == IN_PROGRESS)
        stopped = pool.submit(bench.worker.stop)  # which waits for the step under way
        try:
            assert taken.result(30).result(30) == "lost"
            assert (bench.record(waiting).status, bench.record(waiting).attempt) == (QUEUED, 2)
        finally:
            bench.engine.free.set()
        stopped.result(30)
    assert held.result(30) == "lost"


def test_a_clip_that_cannot_be_decoded_fails_alone(bench: Bench) -> None:
    bench.worker.stop()
    worker = bench.new_worker("two", bench.jobs)
    made = [bench.make(seed=seed) for seed in (1, 2, 3)]
    taken = [worker.take() for _ in made]  # before it starts: so they are in one batch, and end in one step
    bench.engine.undecodable = 2
    worker.start()
    try:
        outcomes = [future.result(30) for future in taken if future is not None]
        assert outcomes == ["completed", "generation_failed", "completed"]
    finally:
        worker.stop()
    assert [bench.record(job).status for job in made] == [COMPLETED, FAILED, COMPLETED]
    assert bench.figures.batches[0] == (3, 1)


def test_a_broken_engine_gives_its_videos_back_until_they_were_lost_too_often(bench: Bench) -> None:
    job = bench.make()
    bench.engine.break_with = RuntimeError("a broken device")
    for attempt in (1, 2, 3):
        worker = bench.new_worker(f"number {attempt}", bench.jobs)
        worker.start()
        future = worker.take()
        assert future is not None
        assert future.result(30) == "lost"
        assert worker.failure is bench.engine.break_with, "so that the replica is replaced"
        assert worker.take() is None, "a broken one takes no more"
        worker.stop()
        bench.engine.drop(job.id)
        record = bench.record(job)
        assert record.status == (FAILED if attempt == 3 else QUEUED)
    assert (record.error_code, record.attempt) == (EXHAUSTED, 3)


def test_a_stopped_worker_gives_back_what_is_unfinished(bench: Bench) -> None:
    bench.engine.free.clear()
    job = bench.make(1)
    future = bench.take()
    bench.engine.leave.release()
    until(lambda: bench.record(job).progress == 25)
    stopping = threading.Thread(target=bench.worker.stop)
    stopping.start()
    until(bench.worker._stopping.is_set)
    bench.engine.leave.release()  # the step under way
    stopping.join(30)
    assert future.result(1) == "lost"
    record = bench.record(job)
    assert (record.status, record.progress, record.attempt) == (QUEUED, 0, 2)
    assert bench.worker.take() is None
    bench.engine.drop(job.id)
    bench.engine.free.set()
    bench.worker = bench.new_worker("two", bench.jobs)
    bench.worker.start()
    assert bench.take().result(30) == "completed"
    assert bench.record(job).attempt == 2


def test_a_clip_that_cannot_be_stored_is_tried_again(bench: Bench) -> None:
    bench.clips.away = StorageError("the bucket is away", "wait")
    job, other = bench.make(seed=1), bench.make(seed=2)
    assert [bench.take().result(30) for _ in range(2)] == ["storage_failed"] * 2
    assert [bench.record(each).status for each in (job, other)] == [IN_PROGRESS] * 2, "until the leases lapse"
    bench.clips.away = None
    until(lambda: bench.jobs.reclaim() or bench.record(job).status == QUEUED)
    until(lambda: bench.jobs.reclaim() or bench.record(other).status == QUEUED)
    assert [bench.take().result(30) for _ in range(2)] == ["completed"] * 2
    assert [bench.record(each).attempt for each in (job, other)] == [2, 2]


@pytest.mark.parametrize("call", ["heartbeat", "complete", "fail"])
def test_records_that_are_away_for_a_moment_break_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    if call == "fail":
        Path(str(bench.targets[1].location), adapters.WEIGHTS_NAME).write_bytes(b"broken")
    with monkeypatch.context() as patch:

        def away(*_: object, **__: object) -> None:
            raise OperationalError("select", {}, Exception("server closed the connection"))

        patch.setattr(bench.jobs, call, away)
        job = bench.make(1)
        outcome = bench.take().result(30)
    expected = {"heartbeat": "completed", "complete": "storage_failed", "fail": "adapter_unusable"}
    assert outcome == expected[call]
    assert bench.worker.failure is None
    if call != "heartbeat":
        until(lambda: bench.jobs.reclaim() or bench.record(job).status == QUEUED)
        assert bench.take().result(30) == ("completed" if call == "complete" else "adapter_unusable")
