"""Training slots on Ray Train: one worker group each, which keeps the base model and takes identities in turn.

A trainer per identity would load the base model, start processes and join a process group for every person. A slot does
that once; between identities only the LoRA and the optimizer state change. Slots come and go while the job runs: as
many as there is work for, up to the recipe's number; one that cannot be placed waits for the cluster to grow, one that
dies gives its identity back, which another slot takes up from the last checkpoint.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.collective
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from magicid import storage, storage_errors
from magicid.errors import MagicIDError, StorageError, TrainingError
from magicid.recipe import Recipe
from magicid.run import Run
from ray_jobs.queue import Held, Task
from ray_jobs.work import END, TRAINING

POLL_S = 0.3  # how often an idle slot asks for work
ROUND_S = 20.0  # after so long the workers of an idle slot meet, so that none waits in a collective for ever
TELL_S = 1.0  # at most so often a slot tells its step
BROKEN_STARTS = 3  # for each slot: so many that broke in a row before they took an identity, and nothing can be trained


class Slots:
    """The slots of one job. The driver calls `adjust` again and again; everything else happens in the slots."""

    def __init__(self, recipe: Recipe, run: Run, work: tuple[str, Any]) -> None:
        self.recipe, self.run = recipe, run
        self._work_name, self._work = work
        self._threads: dict[str, threading.Thread] = {}
        self._held: dict[str, Held] = {}
        self._broken, self._last_error = 0, ""
        self._problem = ""

    def adjust(self, waiting: int, held: dict[str, Held]) -> str:
        """Start slots until there are as many as there is work for; returns what went wrong since the last call.

        Args:
            waiting, held: the training queue, as the work actor shows it.

        Raises:
            TrainingError: no slot can start.
        """
        self._held = held
        self._threads = {slot: thread for slot, thread in self._threads.items() if thread.is_alive()}
        if self._broken >= BROKEN_STARTS * self.recipe.resources.slots:
            action = "see the worker's log and `magicid check`, then run the same command again"
            raise TrainingError(f"training slots cannot start: {self._last_error}", action)
        wanted = min(self.recipe.resources.slots, waiting + len(held))
        for _ in range(wanted - len(self._threads)):
            slot = f"slot-{uuid.uuid4().hex[:8]}"
            self._threads[slot] = threading.Thread(target=self._fit, args=(slot,), daemon=True)
            self._threads[slot].start()
        problem, self._problem = self._problem, ""
        return problem

    def join(self, timeout_s: float = 60) -> None:
        """Wait for the slots that were sent home."""
        end = time.monotonic() + timeout_s
        for thread in self._threads.values():
            thread.join(max(0.0, end - time.monotonic()))

    def _fit(self, slot: str) -> None:
        try:
            _trainer(self.recipe, self.run, self._work_name, slot).fit()
        except Exception as error:  # the slot is gone; its identity goes back to the queue
            try:
                trained = ray.get(self._work.has_trained.remote(slot))
            except ray.exceptions.RayActorError:
                return  # the queues are gone, and this start with them
            self._problem = self._last_error = _reason(error)
            self._broken = 0 if trained else self._broken + 1
            self._work.call.remote(TRAINING, "release", slot, self._last_error, counted=not self._machine_lost(slot))
        else:
            self._broken = 0

    def _machine_lost(self, slot: str) -> bool:
        """Whether the slot's machine is gone, which is nothing its identity could be blamed for."""
        held = self._held.get(slot)
        node = held.note.get("node") if held else None
        return node is not None and not any(n["NodeID"] == node and n["Alive"] for n in ray.nodes())


def _reason(error: Exception) -> str:
    """One line for the ledger: Ray Train's errors hold a traceback, whose last line says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else 'no message'}"


def _trainer(recipe: Recipe, run: Run, work_name: str, slot: str) -> TorchTrainer:
    resources = recipe.resources
    per_worker = {"CPU": resources.worker_cpus, **({"GPU": resources.worker_gpus} if resources.worker_gpus else {})}
    filesystem, path = _filesystem(run.path("ray_train"))
    return TorchTrainer(
        slot_loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"), "run": run.location, "work": work_name, "slot": slot,
        },
        # nccl refuses two ranks on one GPU, which a share of a GPU may mean
        torch_config=TorchConfig(backend="nccl" if resources.worker_gpus >= 1 else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers_per_slot, use_gpu=resources.worker_gpus > 0, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=f"{work_name}-{slot}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),  # the queue counts tries, of identities and not of slots
        ),
    )  # fmt: skip


def _filesystem(location: str) -> tuple[PyFileSystem | None, str]:
    """The location as Ray Train takes it: through fsspec, so that it has the run's own credentials and endpoints."""
    filesystem, path = storage.open_fs(location)
    return (None if isinstance(filesystem, LocalFileSystem) else PyFileSystem(FSSpecHandler(filesystem))), path


class Cancelled(Exception):
    """The identity in hand is no longer this slot's."""


def slot_loop(config: dict[str, Any]) -> None:
    """The train function of one worker: take an identity, train it, take the next, until sent home."""
    from ray_jobs.slot_worker import SlotWorker

    work, slot = ray.get_actor(config["work"]), config["slot"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    worker = SlotWorker(Recipe.model_validate(config["recipe"]), Run(config["run"]))
    while True:
        # rank 0 asks the queue, all ranks take the same task
        name = ray.train.collective.broadcast_from_rank_zero(_next(work, slot) if rank == 0 else None)
        if name == END:
            return
        found: Any = ray.get(work.call.remote(TRAINING, "task", name)) if name else None
        task: Task | None = found
        if task is None:
            continue
        tell = _Teller(work, slot, task.task_id) if rank == 0 else None
        try:
            result = worker.train(task, tell or (lambda step, metrics: None))
        except MagicIDError as error:  # this identity stops, with its last good checkpoint
            away = isinstance(error, StorageError) and storage_errors.outage(error)  # which another try may not meet
            method = "release" if away else "fail"
            ray.get(work.call.remote(TRAINING, "call_for", task.task_id, slot, method, str(error)))  # heard once
            if world_size > 1:  # it may have met this worker alone, and the others wait for it in the middle of a step
                raise
        except Cancelled:
            if world_size > 1:  # the other workers are in the middle of a step: start them all again
                raise
        else:
            if rank == 0:
                ray.get(work.call.remote(TRAINING, "call_for", task.task_id, slot, "done", result))


def _next(work: Any, slot: str) -> str | None:
    """The id of the next task; END; None when none came for a while."""
    end = time.monotonic() + ROUND_S
    while time.monotonic() < end:
        task = ray.get(work.take.remote(TRAINING, slot))
        if task is not None:
            return END if task == END else str(task.task_id)
        time.sleep(POLL_S)
    return None


class _Teller:
    """Tells the queue how far a task is, now and then, and hears whether it is still wanted."""

    def __init__(self, work: Any, slot: str, task_id: str) -> None:
        self.work, self.slot, self.task_id = work, slot, task_id
        self.node = ray.get_runtime_context().get_node_id()
        self._told = 0.0

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if time.monotonic() - self._told < TELL_S:
            return
        self._told = time.monotonic()
        note = {"step": step, "metrics": metrics, "node": self.node}
        if not ray.get(self.work.call.remote(TRAINING, "progress", self.slot, self.task_id, note)):
            raise Cancelled
