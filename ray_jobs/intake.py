"""Manifest rows -> checked identities, on Ray Data: photos are decoded and faces found by an actor pool.

Rows that coroutines ask for at about the same time share a pass, and so do those who are likely to come next: the face
models are loaded once for many people, also where these are admitted one by one. What is found of a person ahead counts
for the very row it was found with, once: until its turn comes, a row may be corrected as if nobody had looked at it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyarrow as pa
import ray

from magicid import erasure, identities, storage
from magicid.attempts import Attempts
from magicid.errors import IdentityError, MagicIDError, RewardError, StorageError
from magicid.manifests import ManifestRow
from magicid.recipe import Recipe
from magicid.rewards.identity import IdentityReward
from magicid.run import Run, ahead_uri, identity_uri
from magicid.schema import Identity
from magicid.weights import resolve
from ray_jobs import pools, watchdog
from ray_jobs.job import cause, in_daemon
from ray_jobs.stages import device, limit_threads, reason

GATHER_S = 1.0  # how long the first row waits for company
ROWS_PER_PASS = 512
AHEAD = 32  # people who are checked with those who are asked for; who is asked for meanwhile waits for them


class CheckIdentities:
    """One-to-one over manifest rows: a checked identity, or why not, as JSON.

    Columns: `row`, JSON; `ahead`, whether nobody asks for it yet.
    """

    def __init__(self, recipe: dict[str, Any], run: str, job: str) -> None:
        self.recipe, self.run = Recipe.model_validate(recipe), Run(run)
        self.attempts = Attempts(self.run, job, self.recipe.repository.attempts)
        limit_threads(self.recipe.resources.threads)
        self.faces = self._reader(self.recipe.rewards.identity, self.recipe.rewards.detection_size)
        metric = self.recipe.evaluation
        size = metric.detection_size or self.recipe.rewards.detection_size
        self.metric_faces = self._reader(metric.identity, size) if metric.identity else None
        watchdog.limit_memory(self.recipe.fleet.memory_limit_gib)

    def _reader(self, folder: str, detection_size: int) -> IdentityReward:
        return IdentityReward.from_pretrained(
            resolve(folder),
            detection_size=detection_size,
            detection_threshold=self.recipe.identities.detection_threshold,
            device=device(),
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({"result": [json.dumps(self._check(**row)) for row in batch.to_pylist()]})

    def _check(self, row: str, ahead: bool) -> dict[str, Any]:
        known = ManifestRow(**json.loads(row))
        try:
            result = self._look(known, row, ahead)
            _remove_if_deleted(self.run, known.id)
        except StorageError as error:
            return {"id": known.id, "problem": error.problem, "action": error.action}
        return result

    def _look(self, known: ManifestRow, row: str, ahead: bool) -> dict[str, Any]:
        keep = functools.partial(storage.write_json, self.run.path(ahead_uri(known.id)))
        try:
            if ahead and self._settled(known.id):
                return {"id": known.id}
            person = self._identity(known, ahead)
            if ahead:
                keep({"row": row, "id": known.id, "person": dataclasses.asdict(person)})
            else:
                self.run.write(identity_uri(known.id), [person], Identity)
            return {"id": known.id, "person": dataclasses.asdict(_light(person))}
        except MagicIDError as error:
            problem = {"id": known.id, "problem": error.problem, "action": error.action}
            if ahead and isinstance(error, IdentityError):  # a verdict on the row: not on a storage, nor on a process
                with suppress(StorageError):
                    keep({"row": row, **problem})
            return problem
        except Exception as error:  # one identity must not end the others
            return {"id": known.id, "problem": reason(error), "action": "check its photos"}

    def _identity(self, row: ManifestRow, ahead: bool) -> Identity:
        key = f"identity-{row.id}"
        self.attempts.begin(key)  # a photo may kill the process
        try:
            with watchdog.time_limit(self.recipe.fleet.clip_limit_s):
                return identities.check_identity(row, self.recipe, self.faces, self.metric_faces, self.run.location)
        finally:
            if ahead:  # the tries are for when the turn comes; only those that took their process along count
                self.attempts.came_back(key)

    def _settled(self, identity_id: str) -> bool:
        """Whether nothing is to be found out ahead: it was checked before, or the person was deleted meanwhile."""
        there = self.run.has(identity_uri(identity_id)) or self.run.has(ahead_uri(identity_id))
        return there or _is_deleted(self.run, identity_id)


class Intake:
    """Checks identities for many coroutines at once.

    Attributes:
        problem: why nobody can be checked, when nobody can.
        following: those who are likely to be asked for next, at most so many.
    """

    def __init__(self, recipe: Recipe, run: Run, job: str) -> None:
        self.recipe, self.run, self.job = recipe, run, job
        self.problem: MagicIDError | None = None
        self.following: Callable[[int], list[ManifestRow]] = lambda number: []
        self._waiting: dict[str, tuple[ManifestRow, asyncio.Future[dict[str, Any]]]] = {}
        self._ahead: dict[str, asyncio.Future[dict[str, Any]]] = {}  # those whom the pass under way checks ahead
        self._looked_at: set[str] = set()  # checked ahead at this start: once is enough
        self._pass: asyncio.Task[None] | None = None

    async def check(self, row: ManifestRow) -> Identity:
        """One identity, checked now or earlier; without its embeddings, which the driver has no use for.

        Raises:
            IdentityError: it cannot be used; all reasons are named.
        """
        if await asyncio.to_thread(self.run.has, identity_uri(row.id)):
            return _light(await asyncio.to_thread(self.run.identity, row.id))
        if row.id in self._ahead:
            await asyncio.wait([self._ahead[row.id]])
        result = await asyncio.to_thread(self._found_ahead, row)
        if result is None:
            future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            self._waiting[row.id] = (row, future)
            if self._pass is None or self._pass.done():
                self._pass = asyncio.create_task(self._passes())
            result = await future
        if "problem" in result:
            raise IdentityError(result["problem"], result["action"])
        return _light(Identity(**result["person"]))

    def _found_ahead(self, row: ManifestRow) -> dict[str, Any] | None:
        """What was found ahead, if it was with this very row; then the identity is begun with it."""
        location = self.run.path(ahead_uri(row.id))
        if not storage.exists(location):
            return None
        found: dict[str, Any] = storage.read_json(location)
        same = found["row"] == _text(row)
        if same and "person" in found:
            self.run.write(identity_uri(row.id), [Identity(**found["person"])], Identity)
        storage.remove(location)
        _remove_if_deleted(self.run, row.id)
        return found if same else None

    async def forget(self, identity_id: str) -> None:
        """Remove what was found ahead of somebody whose turn does not come."""
        if await asyncio.to_thread(self.run.has, ahead_uri(identity_id)):
            await asyncio.to_thread(storage.remove, self.run.path("identities", identity_id))

    async def _passes(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            names = list(self._waiting)[:ROWS_PER_PASS]
            asked = [self._waiting.pop(name) for name in names]
            ahead = [row for row in self.following(AHEAD) if row.id not in {*names, *self._waiting, *self._looked_at}]
            self._looked_at |= {row.id for row in ahead}
            self._ahead = {row.id: loop.create_future() for row in ahead}
            futures = {**self._ahead, **{row.id: future for row, future in asked}}

            def tell(result: dict[str, Any], futures: dict[str, Any] = futures) -> None:
                loop.call_soon_threadsafe(_set, futures[result["id"]], result)

            try:
                await in_daemon(functools.partial(self._check, [row for row, _ in asked], ahead, tell))
            except Exception as error:
                action = "see the worker's log and `magicid check`, then run the same command again"
                self.problem = RewardError(f"photos cannot be checked: {cause(error)}", action)
            for future in self._ahead.values():
                _set(future, {})
            self._ahead = {}

    def _check(self, rows: list[ManifestRow], ahead: list[ManifestRow], tell: Callable[[dict[str, Any]], None]) -> None:
        pools.configure()
        items = [{"row": _text(row), "ahead": number >= len(rows)} for number, row in enumerate([*rows, *ahead])]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        arguments = {"recipe": self.recipe.model_dump(mode="json"), "run": self.run.location, "job": self.job}
        for result in pools.add_stage(dataset, CheckIdentities, self.recipe.resources.identity, arguments).iter_rows():
            tell(json.loads(result["result"]))


def _is_deleted(run: Run, identity_id: str) -> bool:
    return erasure.tombstone(identity_id) in erasure.erased(run.location)


def _remove_if_deleted(run: Run, identity_id: str) -> None:
    """What was written of somebody who was deleted while it was found out."""
    if _is_deleted(run, identity_id):
        storage.remove(run.path("identities", identity_id))


def _set(future: asyncio.Future[dict[str, Any]], result: dict[str, Any]) -> None:
    if not future.done():
        future.set_result(result)


def _text(row: ManifestRow) -> str:
    return json.dumps(dataclasses.asdict(row), sort_keys=True)


def _light(person: Identity) -> Identity:
    return dataclasses.replace(person, references=[], metric_references=[])
