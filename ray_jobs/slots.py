"""Training slots on Ray Train: one worker group each, which keeps the base model and takes identities in turn.

A trainer per identity would load the base model, start processes and join a process group for every person. A slot does
that once; between identities only the LoRA and the optimizer state change. A slot whose worker dies is started again by
Ray Train and goes on from the identity's last checkpoint; an identity that kills its worker each time is given up.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from typing import Any

import ray
import ray.train
import ray.train.collective
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from magicid import storage
from magicid.errors import MagicIDError
from magicid.recipe import Recipe
from magicid.run import Run
from ray_jobs.progress import Display
from ray_jobs.queue import FairQueue, Outcome, Task

POLL_S = 0.5


def set_environment(recipe: Recipe) -> None:
    """Environment of this process and of the workers it starts: threads wait asleep, few of them on a laptop."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own notes between the progress bars
    if recipe.resources.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(recipe.resources.threads))


def train(recipe: Recipe, run: Run, tasks: list[Task], display: Display) -> dict[str, Outcome]:
    """Train all tasks in `recipe.resources.slots` slots; how each ended, by task id.

    A slot that ends with an error leaves its task to the next round of slots, until the task's attempts are used up.
    Slots that break before they take a task, as with a model that cannot be loaded, fail all that still wait.
    """
    if not tasks:
        return {}
    name = f"magicid-queue-{uuid.uuid4().hex[:8]}"
    queue: Any = ray.remote(FairQueue).options(name=name, num_cpus=0).remote(tasks, recipe.resources.max_failures + 1)  # type: ignore[call-overload]
    try:
        while True:
            before = _attempts(queue)
            errors = _round(recipe, run, name, queue, min(recipe.resources.slots, len(tasks)), display)
            if errors and _attempts(queue) == before:
                ray.get(queue.fail_waiting.remote(errors[0]))
            outcomes: dict[str, Outcome] = ray.get(queue.outcomes.remote())
            if not any(outcome.state == "waiting" for outcome in outcomes.values()):
                return outcomes
            display.say(f"training slots start again: {errors[0] if errors else 'tasks are left'}", "yellow")
    finally:
        ray.kill(queue)


def _attempts(queue: Any) -> int:
    """Attempts of all tasks together."""
    return sum(outcome.attempts for outcome in ray.get(queue.outcomes.remote()).values())


def _round(recipe: Recipe, run: Run, name: str, queue: Any, count: int, display: Display) -> list[str]:
    """Run the slots until each has ended; the errors of those that broke."""
    errors: list[str] = []

    def fit(slot: str) -> None:
        try:
            _trainer(recipe, run, name, slot).fit()
        except Exception as error:  # the slot is gone; its identity goes back to the queue
            errors.append(f"{type(error).__name__}: {error}")
            ray.get(queue.release.remote(slot, errors[-1]))

    threads = [threading.Thread(target=fit, args=(f"slot-{number}",), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for task_id, outcome in ray.get(queue.outcomes.remote()).items():
            if outcome.state == "running":
                note = "  ".join(f"{key} {value:.3g}" for key, value in outcome.metrics.items())
                display.show(f"{outcome.stage} {task_id}", outcome.step, outcome.steps, note)
        time.sleep(POLL_S)
    return errors


def _trainer(recipe: Recipe, run: Run, queue_name: str, slot: str) -> TorchTrainer:
    resources = recipe.resources
    per_worker = {"CPU": resources.worker_cpus, **({"GPU": resources.worker_gpus} if resources.worker_gpus else {})}
    filesystem, path = _filesystem(run.path("ray_train"))
    return TorchTrainer(
        slot_loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"), "run": run.location, "queue": queue_name, "slot": slot,
        },
        # nccl refuses two ranks on one GPU, which a share of a GPU may mean
        torch_config=TorchConfig(backend="nccl" if resources.worker_gpus >= 1 else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers_per_slot, use_gpu=resources.worker_gpus > 0, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name=f"{queue_name}-{slot}-{uuid.uuid4().hex[:6]}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )  # fmt: skip


def _filesystem(location: str) -> tuple[PyFileSystem | None, str]:
    """The location as Ray Train takes it: through fsspec, so that it has the run's own credentials and endpoints."""
    filesystem, path = storage.open_fs(location)
    return (None if isinstance(filesystem, LocalFileSystem) else PyFileSystem(FSSpecHandler(filesystem))), path


def slot_loop(config: dict[str, Any]) -> None:
    """The train function of one worker: take an identity, train it, take the next, until none waits."""
    from ray_jobs.slot_worker import SlotWorker

    queue, slot = ray.get_actor(config["queue"]), config["slot"]
    rank = ray.train.get_context().get_world_rank()
    worker = SlotWorker(Recipe.model_validate(config["recipe"]), Run(config["run"]))
    while True:
        # rank 0 asks the queue, all ranks take the same task
        task = ray.train.collective.broadcast_from_rank_zero(ray.get(queue.take.remote(slot)) if rank == 0 else None)
        if task is None:
            return

        def progress(step: int, metrics: dict[str, float]) -> None:
            if rank == 0:
                queue.progress.remote(slot, step, metrics)

        try:
            result = worker.train(task, progress)
        except MagicIDError as error:  # this identity stops, with its last good checkpoint; the slot goes on
            if rank == 0:
                ray.get(queue.fail.remote(slot, str(error)))
        else:
            if rank == 0:
                ray.get(queue.done.remote(slot, result))
