"""What every stage of a job needs, what has been set aside, and the cluster it runs on."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import ray

from magicid.errors import MagicIDError, StorageError
from magicid.recipe import Recipe
from magicid.run import Run
from magicid.schema import Rejected
from ray_jobs import slots
from ray_jobs.progress import Display

T = TypeVar("T")


@dataclass
class Job:
    """What every stage needs, and what has been set aside so far."""

    recipe: Recipe
    run: Run
    display: Display
    base_sha256: str
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    rejected: list[Rejected] = field(default_factory=list)

    def set_aside(self, kind: str, name: str, error: MagicIDError) -> None:
        """Report something that cannot be used, and go on."""
        self.rejected.append(Rejected(kind, name, error.problem, error.action))
        self.display.say(f"set aside {kind} {name}: {error}", "yellow")

    def attempt(self, stage: str, make: Callable[[], T], otherwise: T) -> T:
        """What a late stage makes; where it fails, the reason is set aside and what was trained is not lost."""
        try:
            return make()
        except Exception as error:
            problem = (
                error if isinstance(error, MagicIDError) else MagicIDError(cause(error), "run again to try it again")
            )
            self.set_aside("stage", stage, problem)
            return otherwise


def connect(settings: Recipe) -> None:
    """Join the cluster this process runs in (`ray job submit`), or start one on this machine."""
    slots.set_environment(settings)
    address = os.environ.get("RAY_ADDRESS", "")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        if address and not address.startswith("http"):  # an http address is meant for `ray job submit` itself
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)


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


def cause(error: BaseException) -> str:
    """The last line of what a Ray worker says went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
