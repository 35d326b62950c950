"""Where a job runs: the cluster it joins, the run directory as all processes see it, and what Ray says went wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from magicid.errors import MagicIDError, StorageError
from magicid.recipe import Recipe

T = TypeVar("T")
KEPT_BYTES, MAPPED_BYTES = 1 << 28, 1 << 25  # glibc: free memory that a process keeps; larger blocks are mapped


def connect(settings: Recipe) -> None:
    """Join the cluster this process runs in (`ray job submit`), or start one on this machine."""
    set_environment(settings)
    address = os.environ.get("RAY_ADDRESS", "")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        if address and not address.startswith("http"):  # an http address is meant for `ray job submit` itself
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)


def set_environment(recipe: Recipe) -> None:
    """Environment of this process and of the workers it starts: threads wait asleep, few of them on a laptop, and freed
    memory is kept for the next layer instead of going back to the kernel, which on a CPU costs a tenth of the time."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(KEPT_BYTES))
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(MAPPED_BYTES))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own notes between the progress bars
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")  # a dozen actors on two cores are no mistake
    if recipe.resources.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(recipe.resources.threads))


def submission() -> str:
    """The submission id of the job that this process is; empty where it was not submitted."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return str(told.get("metadata", {}).get("job_submission_id", ""))


def run_location(out: str) -> str:
    """The run directory as every process of the cluster sees it. Raises StorageError where they could not."""
    if "://" in out:
        return out
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not os.path.isabs(out):
        raise StorageError(
            f"--out {out} is relative to the copy of the code that a submitted job runs in, and would be lost with it",
            "give an absolute path that all nodes share, or a URL such as s3://bucket/run",
        )
    return os.path.abspath(out)


async def in_daemon(call: Callable[[], T]) -> T:
    """Await a blocking call in a thread that does not keep the process alive, as those of `asyncio.to_thread` would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(set_: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_(value)

    def run() -> None:
        try:
            value = call()
        except Exception as error:
            loop.call_soon_threadsafe(tell, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(tell, future.set_result, value)

    threading.Thread(target=run, daemon=True).start()
    return await future


def cause(error: BaseException) -> str:
    """The last line of what a Ray worker says went wrong."""
    if isinstance(error, MagicIDError):
        return error.problem
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
