"""Manifest rows -> checked identities, on Ray Data: photos are decoded and faces found by an actor pool.

Rows that coroutines ask for at about the same time share a pass, so the face models are loaded once for many people.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from typing import Any

import pyarrow as pa
import ray

from magicid import identities
from magicid.attempts import Attempts
from magicid.errors import IdentityError, MagicIDError, RewardError
from magicid.manifests import ManifestRow
from magicid.recipe import Recipe
from magicid.rewards.identity import IdentityReward
from magicid.run import Run, identity_uri
from magicid.schema import Identity
from magicid.weights import resolve
from ray_jobs import pools, watchdog
from ray_jobs.job import cause, in_daemon
from ray_jobs.stages import device, limit_threads, reason

GATHER_S = 1.0  # how long the first row waits for company
ROWS_PER_PASS = 512


class CheckIdentities:
    """One-to-one over manifest rows (JSON in the column `row`): a checked identity, or why not, as JSON."""

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
        return pa.table({"result": [json.dumps(self._check(text)) for text in batch.column("row").to_pylist()]})

    def _check(self, text: str) -> dict[str, Any]:
        row = ManifestRow(**json.loads(text))
        try:
            self.attempts.begin(f"identity-{row.id}")  # a photo may kill the process
            with watchdog.time_limit(self.recipe.fleet.clip_limit_s):
                person = identities.check_identity(row, self.recipe, self.faces, self.metric_faces, self.run.location)
            self.run.write(identity_uri(row.id), [person], Identity)
            return {"id": row.id, "person": dataclasses.asdict(_light(person))}
        except MagicIDError as error:
            return {"id": row.id, "problem": error.problem, "action": error.action}
        except Exception as error:  # one identity must not end the others
            return {"id": row.id, "problem": reason(error), "action": "check its photos"}


class Intake:
    """Checks identities for many coroutines at once."""

    def __init__(self, recipe: Recipe, run: Run, job: str) -> None:
        self.recipe, self.run, self.job = recipe, run, job
        self._waiting: dict[str, tuple[ManifestRow, asyncio.Future[Identity]]] = {}
        self._pass: asyncio.Task[None] | None = None
        self.problem: MagicIDError | None = None  # why nobody can be checked, when nobody can

    async def check(self, row: ManifestRow) -> Identity:
        """One identity, checked now or earlier; without its embeddings, which the driver has no use for.

        Raises:
            IdentityError: it cannot be used; all reasons are named.
        """
        if await asyncio.to_thread(self.run.has, identity_uri(row.id)):
            return _light(await asyncio.to_thread(self.run.identity, row.id))
        future: asyncio.Future[Identity] = asyncio.get_running_loop().create_future()
        self._waiting[row.id] = (row, future)
        if self._pass is None or self._pass.done():
            self._pass = asyncio.create_task(self._passes())
        return await future

    async def _passes(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            names = list(self._waiting)[:ROWS_PER_PASS]
            asked = {name: self._waiting.pop(name) for name in names}
            loop = asyncio.get_running_loop()

            def tell(result: dict[str, Any], asked: dict[str, Any] = asked, loop: Any = loop) -> None:
                loop.call_soon_threadsafe(self._tell, asked[result["id"]][1], result)

            try:
                await in_daemon(functools.partial(self._check, [row for row, _ in asked.values()], tell))
            except Exception as error:
                action = "see the worker's log and `magicid check`, then run the same command again"
                self.problem = RewardError(f"photos cannot be checked: {cause(error)}", action)

    def _check(self, rows: list[ManifestRow], tell: Any) -> None:
        pools.configure()
        items = [{"row": json.dumps(dataclasses.asdict(row))} for row in rows]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        arguments = {"recipe": self.recipe.model_dump(mode="json"), "run": self.run.location, "job": self.job}
        for result in pools.add_stage(dataset, CheckIdentities, self.recipe.resources.identity, arguments).iter_rows():
            tell(json.loads(result["result"]))

    def _tell(self, future: asyncio.Future[Identity], result: dict[str, Any]) -> None:
        if future.done():
            return
        if "problem" in result:
            future.set_exception(IdentityError(result["problem"], result["action"]))
        else:
            future.set_result(Identity(**result["person"]))


def _light(person: Identity) -> Identity:
    return dataclasses.replace(person, references=[], metric_references=[])
