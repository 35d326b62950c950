"""Machines of a simulation: GPUs as numbers, on an event loop whose clock jumps to the next thing that happens."""

from __future__ import annotations

import asyncio
import functools
import random
import selectors
import time
import types
from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from magicid.recipe import Recipe
from ray_jobs.queue import Task
from ray_jobs.work import Work

T = TypeVar("T")


@dataclass(frozen=True)
class Durations:
    """Seconds on one GPU, of the size of HunyuanVideo at 480p and 61 frames on an H100. Assumed, not measured."""

    check: float = 5.0  # the photos of one identity
    clip: float = 80.0  # sampled
    photo_clip: float = 2.0  # encoded
    validation_clip: float = 4.0  # decoded
    found_clip: float = 0.5  # made for somebody else
    identity: float = 4.0
    motion: float = 4.0
    semantics: float = 6.0
    measure: float = 10.0
    sft_step: float = 2.5
    hpo_step: float = 5.0
    load: float = 90.0  # a model, before the first piece of work
    task: float = 2.0  # selection, publication
    spread: float = 0.1  # each takes up to that much more or less


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a clock of its own."""

    def __init__(self) -> None:
        self._virtual = 0.0
        super().__init__(_Selector(self))
        self._clock_resolution = 1e-6  # of a sum of floats after weeks

    def time(self) -> float:
        """Simulated seconds since the loop was made."""
        return self._virtual

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Run it now: a thread would take real time, in which the clock could jump."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation stands still: everybody waits for somebody")
        self._loop._virtual += max(0.0, timeout)
        return super().select(0)


class Cluster:
    """GPUs as numbers, and who was busy. Times are simulated seconds.

    Attributes:
        busy: device-seconds, by owner and by what was kept busy.
        cpu: real seconds of this process's CPU spent on what other processes do in a real job: `far`, the workers'
            side, and `queues`, the actor beside the driver.
        steps: how often the loop went on with something of the workers' side.
    """

    def __init__(self, recipe: Recipe, durations: Durations, seed: int) -> None:
        self.recipe, self.durations = recipe, durations
        self.busy: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.served: list[tuple[float, str, float]] = []  # (end, owner, device-seconds) of each piece of work
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._others = 0.0  # CPU of what a step called and that is on another account
        self._random = random.Random(seed)

    async def work(self, kind: str, owner: str, gpus: float, seconds: float) -> float:
        """Keep GPUs busy; returns for how long."""
        spread = self.durations.spread
        took = seconds * self._random.uniform(1 - spread, 1 + spread)
        await asyncio.sleep(took)
        self.busy[owner, kind] += took * gpus
        self.served.append((asyncio.get_running_loop().time(), owner, took * gpus))
        return took

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run what a worker does."""
        return asyncio.create_task(self.metered(coroutine, "far"))  # type: ignore[arg-type]

    @types.coroutine
    def metered(self, coroutine: Coroutine[Any, Any, T], account: str) -> Generator[Any, Any, T]:
        """The coroutine, its CPU time counted."""
        send: Callable[[Any], Any] = coroutine.send
        value: Any = None
        while True:
            began, others = time.thread_time(), self._others
            self.steps += account == "far"
            try:
                waits_for = send(value)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            finally:
                self.cpu[account] += time.thread_time() - began - (self._others - others)
            try:
                send, value = coroutine.send, (yield waits_for)
            except BaseException as error:
                send, value = coroutine.throw, error

    def call(self, account: str, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """The function's result; its CPU time is on an account of its own, whoever calls."""
        began, others = time.thread_time(), self._others
        try:
            return function(*arguments, **named)
        finally:
            spent = time.thread_time() - began
            self.cpu[account] += spent - (self._others - others)
            self._others = others + spent


class Here:
    """A handle of `Work` in this process: `handle.method.remote(...)`; tells when something has changed."""

    def __init__(self, work: Work, cluster: Cluster) -> None:
        self._work, self._cluster, self._changed = work, cluster, asyncio.Event()
        self.put, self.call, self.send_home, self.news = (
            types.SimpleNamespace(remote=functools.partial(self.do, name))
            for name in ("put", "call", "send_home", "news")
        )

    def do(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Call it now; what is asynchronous is awaited by the caller."""
        result = self._cluster.call("queues", getattr(self._work, name), *arguments, **named)
        if name == "news":
            return self._cluster.metered(result, "queues")
        if name != "take" and "progress" not in arguments:
            self._changed.set()
            self._changed = asyncio.Event()
        return result

    async def change(self) -> None:
        """Wait until somebody has put, finished or sent home."""
        await self._changed.wait()

    async def take(self, queue: str, holder: str) -> Task | str:
        """The next task; END. Waits for one, where a worker would ask again and again."""
        while (task := self.do("take", queue, holder)) is None:
            await self.change()
        return task  # type: ignore[no-any-return]
