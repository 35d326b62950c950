"""Python imports this at its start where it is on the path: work on people called `<stage>-<way>` goes wrong that way.

    generation-hang, reward-exit, photos-raise, training-allocate, ...

`training-alone`: the second worker of a slot loses the storage, once; MAGICID_POISON is the folder that remembers it.
Only one clip of a person is poison, so that it can be seen whether the others are made.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def go_wrong(identity_id: str | None, stage: str) -> None:
    """What a bad row does."""
    if not identity_id or not identity_id.startswith(f"{stage}-"):
        return
    way = identity_id.removeprefix(f"{stage}-")
    if way == "raise":
        raise ValueError(f"poison in {stage}")
    if way == "hang":
        time.sleep(10_000)
    if way == "exit":
        os._exit(1)
    if way == "allocate":
        blocks = []
        while True:
            blocks.append(bytearray(2**26))
    if way == "alone":
        lose_the_storage_once()


def lose_the_storage_once() -> None:
    """What a worker with rank 1 meets the first time."""
    import ray.train

    from magicid.errors import StorageError

    mark = Path(os.environ["MAGICID_POISON"], "lost")
    if ray.train.get_context().get_world_rank() == 1 and not mark.exists():
        mark.touch()
        raise StorageError("the storage is away", "wait") from ConnectionError("reset")


def before(owner: Any, name: str, look: Callable[..., tuple[str | None, str]]) -> None:
    """Let `look` see the arguments of a function before it is called."""
    whole = getattr(owner, name)

    def poisoned(*arguments: Any, **named: Any) -> Any:
        go_wrong(*look(*arguments))
        return whole(*arguments, **named)

    setattr(owner, name, poisoned)


def first(clip: Any) -> str | None:
    """Whose clip it is, if it is that of the first photo."""
    photo = str(clip.photo_uri or "")
    return clip.identity_id if photo.endswith("photo-1.png") else None


TARGETS: dict[str, Callable[[Any], None]] = {
    "magicid.generation": lambda m: before(m.Generator, "_make", lambda self, clip: (first(clip), "generation")),
    "ray_jobs.stages": lambda m: before(m.ScoreMotion, "score", lambda self, row, *_: (first(row), "reward")),
    "magicid.identities": lambda m: before(m, "check_identity", lambda row, *_: (row.id, "photos")),
    "ray_jobs.slot_worker": lambda m: before(
        m.SlotWorker, "_sft", lambda self, task, *_: (task.payload["identity_id"], "training")
    ),
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls the target's function when its module has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in TARGETS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            TARGETS[name](module)

        loader.exec_module = exec_module
        return spec


if os.environ.get("MAGICID_POISON"):
    sys.meta_path.insert(0, _AfterImport())
