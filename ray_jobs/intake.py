"""Manifest rows -> checked identities, on Ray Data: photos are decoded and faces found by an actor pool."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray

from magicid import identities
from magicid.attempts import Attempts
from magicid.errors import MagicIDError
from magicid.recipe import Recipe
from magicid.rewards.identity import IdentityReward
from magicid.run import Run
from magicid.schema import Identity, Rejected
from magicid.weights import resolve
from ray_jobs import pools
from ray_jobs.progress import Display
from ray_jobs.stages import device, limit_threads, reason


class CheckIdentities:
    """One-to-one over manifest rows (JSON in the column `row`): a checked identity, or why not, as JSON."""

    def __init__(self, recipe: dict[str, Any], run: str, job: str) -> None:
        self.recipe, self.run = Recipe.model_validate(recipe), run
        self.attempts = Attempts(Run(run), job, self.recipe.repository.attempts)
        limit_threads(self.recipe.resources.threads)
        self.faces = self._reader(self.recipe.rewards.identity)
        metric = self.recipe.evaluation.identity
        self.metric_faces = self._reader(metric) if metric else None

    def _reader(self, folder: str) -> IdentityReward:
        return IdentityReward.from_pretrained(
            resolve(folder),
            detection_size=self.recipe.rewards.detection_size,
            detection_threshold=self.recipe.identities.detection_threshold,
            device=device(),
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({"result": [json.dumps(self._check(text)) for text in batch.column("row").to_pylist()]})

    def _check(self, text: str) -> dict[str, Any]:
        row = identities.ManifestRow(**json.loads(text))
        try:
            self.attempts.begin(f"identity-{row.id}")  # a photo may kill the process
            person = identities.check_identity(row, self.recipe, self.faces, self.metric_faces, self.run)
            return {"identity": dataclasses.asdict(person)}
        except MagicIDError as error:
            return {"rejected": dataclasses.asdict(Rejected("identity", row.id, error.problem, error.action))}
        except Exception as error:  # one identity must not end the others
            return {"rejected": dataclasses.asdict(Rejected("identity", row.id, reason(error), "check its photos"))}


def check_identities(
    recipe: Recipe, run: Run, rows: Sequence[identities.ManifestRow], job: str, display: Display
) -> tuple[list[Identity], list[Rejected]]:
    """Check every identity of a manifest; (usable, set aside), in the manifest's order."""
    rejected: list[Rejected] = []
    people: dict[str, Identity] = {}
    if rows:
        pools.configure()
        dataset: ray.data.Dataset = ray.data.from_arrow(
            [pa.table({"row": [json.dumps(dataclasses.asdict(row))]}) for row in rows]
        )
        arguments = {"recipe": recipe.model_dump(mode="json"), "run": run.location, "job": job}
        dataset = pools.add_stage(dataset, CheckIdentities, recipe.resources.identity, arguments, batch_size=1)  # type: ignore[arg-type]
        display.show("identities", 0, len(rows))
        for number, result in enumerate(dataset.iter_rows(), start=1):
            found = json.loads(result["result"])
            if "identity" in found:
                people[found["identity"]["identity_id"]] = Identity(**found["identity"])
            else:
                rejected.append(Rejected(**found["rejected"]))
            display.show("identities", number, len(rows))
    for person in people.values():
        for warning in person.warnings:
            rejected.append(Rejected("photo", person.identity_id, warning, "replace the photo, or leave it out"))
    return [people[row.id] for row in rows if row.id in people], rejected
