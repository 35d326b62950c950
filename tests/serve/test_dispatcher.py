"""The dispatcher: as many calls as the queue wants, and chores that go on whatever fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from magicid import storage
from magicid.errors import StorageError
from serve import clips, dispatcher
from serve.clips import clip_uri
from serve.database import Database
from serve.dispatcher import Dispatcher, nudges_wanted
from serve.jobs import JobStore, NotFound, TenantQueue
from serve.schema import IN_PROGRESS, QUEUED, Job
from serve.settings import ServeSettings
from tests.serve.test_jobs import Clock, make


class Bench:
    """A dispatcher over real records, and calls that end when they are told to."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = ServeSettings.model_validate(
            {"data": str(folder), "max_batch": 4, "max_replicas": 3, **settings}
        )
        self.clock = Clock()
        database = Database(self.settings.database_url)
        database.migrate()
        self.jobs = JobStore(database, lease_s=30, max_attempts=3, retention_s=600, max_queued=1000, clock=self.clock)
        self.calls: list[asyncio.Future[dict[str, Any]]] = []
        self.told: list[list[TenantQueue]] = []
        self.delivered = 0
        self.one = Dispatcher(
            self.settings, self.jobs, self.call, self.deliver, lambda found: self.told.append(list(found))
        )

    async def call(self) -> dict[str, Any]:
        self.calls.append(asyncio.get_running_loop().create_future())
        return await self.calls[-1]

    def deliver(self) -> None:
        self.delivered += 1
        raise RuntimeError("the webhooks' part is broken")

    def clip(self, job: Job) -> str:
        return storage.join(self.settings.clips_location, str(job.video_uri))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize(
    ("open_jobs", "job_s", "wanted"),
    [
        (0, 10.0, 0),
        (3, 0.0, 3),  # nothing is known yet: one replica
        (9, 0.0, 4),
        (9, 1.0, 4),  # 9 s of work in rows of four: one replica is done within a minute
        (25, 10.0, 8),  # 250 s over rows of four: two are needed for 60 s
        (1000, 60.0, 12),  # and never more than max_replicas
        (5, 1000.0, 5),  # nor more calls than videos
    ],
)
def test_calls_follow_the_time_to_drain(open_jobs: int, job_s: float, wanted: int) -> None:
    settings = ServeSettings(max_batch=4, max_replicas=3, drain_s=60)
    assert nudges_wanted(open_jobs, job_s, settings) == wanted


def test_calls_in_flight_are_as_many_as_wanted(bench: Bench) -> None:
    async def play() -> None:
        await bench.one.nudge()
        assert bench.calls == []
        for _ in range(3):
            make(bench.jobs)
        for _ in range(2):  # a second round adds nothing
            await bench.one.nudge()
            await asyncio.sleep(0)
            assert len(bench.calls) == 3
        (job,) = bench.jobs.claim("w")
        bench.jobs.complete(job.id, job.fence, video_uri="v", video_sha256="0")
        bench.calls[0].set_result({"outcome": "completed", "seconds": 4.0})
        bench.calls[1].set_exception(ConnectionError("the replica died"))
        await asyncio.sleep(0)
        await bench.one.nudge()
        await asyncio.sleep(0)
        assert len(bench.calls) == 4, "two videos are open and one call is in flight"
        assert bench.one.job_s == 4.0
        bench.calls[2].set_result({"outcome": "idle", "seconds": 0.0})
        bench.calls[3].set_result({"outcome": "completed", "seconds": 9.0})
        await asyncio.sleep(0)
        await bench.one.nudge()
        assert bench.one.job_s == pytest.approx(0.8 * 4 + 0.2 * 9), "an idle call says nothing about videos"
        for task in bench.one.in_flight:
            task.cancel()

    asyncio.run(play())


def test_a_lost_workers_video_is_queued_again(bench: Bench) -> None:
    job = make(bench.jobs)
    bench.jobs.claim("w")
    bench.one.reclaim()
    assert bench.jobs.get(job.id, None).status == IN_PROGRESS
    bench.clock.now += 31
    bench.one.reclaim()
    again = bench.jobs.get(job.id, None)
    assert (again.status, again.attempt) == (QUEUED, 2)


def test_videos_past_their_time_lose_their_file_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for number in range(2):
        make(bench.jobs)
        (job,) = bench.jobs.claim("w")
        uri = f"{number}/{job.id}.mp4"
        storage.write_bytes(storage.join(bench.settings.clips_location, uri), b"clip")
        bench.jobs.complete(job.id, job.fence, video_uri=uri, video_sha256="0")
        done.append(bench.jobs.get(job.id, None))
    bench.one.expire()
    assert all(storage.exists(bench.clip(job)) for job in done)
    bench.clock.now += 601
    remove = storage.remove

    def away(location: str) -> None:
        if location == bench.clip(done[0]):
            raise StorageError("the bucket is away", "wait")
        remove(location)

    monkeypatch.setattr(clips, "remove", away)
    bench.one.expire()
    assert bench.jobs.get(done[0].id, None) == done[0], "its file is there, so a record must name it"
    with pytest.raises(NotFound):
        bench.jobs.get(done[1].id, None)
    monkeypatch.setattr(clips, "remove", remove)
    bench.one.expire()
    assert not storage.exists(bench.clip(done[0]))
    with pytest.raises(NotFound):
        bench.jobs.get(done[0].id, None)


def test_clips_that_a_dead_worker_left_go_with_the_record(bench: Bench) -> None:
    job = make(bench.jobs)
    folder = Path(bench.settings.clips_location, job.id[-2:])
    folder.mkdir(parents=True)
    bench.jobs.claim("w")
    for name in (f"{job.id}-1.mp4", f".{job.id}-1.mp4.01234567.partial", f"{job.id}0-1.mp4"):
        (folder / name).write_bytes(b"clip")  # the worker died here
    bench.clock.now += 31
    bench.one.reclaim()
    (again,) = bench.jobs.claim("w")
    uri = clip_uri(job.id, again.fence)
    storage.write_bytes(storage.join(bench.settings.clips_location, uri), b"clip")
    bench.jobs.complete(job.id, again.fence, video_uri=uri, video_sha256="0")
    bench.clock.now += 601
    bench.one.expire()
    assert [path.name for path in folder.iterdir()] == [f"{job.id}0-1.mp4"], "which is another job's"


async def _until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_a_chore_that_fails_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "TIDY_S", 0.02)
    lost = make(bench.jobs, "a")
    bench.jobs.claim("w")
    waiting = make(bench.jobs, "b")

    async def play() -> None:
        task = asyncio.ensure_future(bench.one.run())
        await _until(lambda: bench.delivered > 3 and bench.told)
        assert bench.told[0] == [TenantQueue("b", 1, 0.0)]
        bench.clock.now += 31
        await _until(lambda: bench.jobs.get(lost.id, None).status == QUEUED)
        await _until(lambda: len(bench.told[-1]) == 2)
        assert bench.told[-1] == [TenantQueue("a", 1, 31.0), TenantQueue("b", 1, 31.0)]
        assert len(bench.calls) == 2
        assert not task.done()
        await _cancelled(task)

    asyncio.run(play())
    assert bench.jobs.get(waiting.id, None).status == QUEUED


async def _cancelled(task: Awaitable[None]) -> None:
    assert isinstance(task, asyncio.Task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
