"""Photos are checked on real Ray, also of people whose turn has not come."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from magicid import manifests, recipe, storage
from magicid.errors import IdentityError
from magicid.manifests import ManifestRow
from magicid.run import Run, ahead_uri
from ray_jobs.intake import Intake
from ray_jobs.job import connect

PEOPLE = Path(__file__).parents[2] / "examples" / "identities"


@pytest.fixture
def cluster() -> Iterator[None]:
    connect(recipe.load("face-world"))
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_who_comes_next_is_checked_ahead_and_a_changed_row_anew(tmp_path: Path) -> None:
    rows, _ = manifests.read_manifest(str(PEOPLE))
    ada, bruno, chidi, dana = rows
    dana = dataclasses.replace(dana, photos=["nowhere.png"])
    run = Run(str(tmp_path))

    async def scenario() -> None:
        intake, passes = Intake(recipe.load("face-world"), run, "job"), list[object]()

        async def check(row: ManifestRow) -> int:
            """Photos of the person; afterwards no pass is under way."""
            try:
                return len((await intake.check(row)).photos)
            finally:
                if intake._pass not in passes:
                    passes.append(intake._pass)
                await asyncio.wait([intake._pass])

        intake.following = lambda number: [bruno, chidi, dana][:number]
        assert await check(ada) == 5
        assert run.identity_ids() == ["ada"]  # the others are not begun
        assert all(run.has(ahead_uri(row.id)) for row in (bruno, chidi, dana))
        tried = [name.rsplit("/", 1)[-1] for name in storage.list_files(run.path("attempts", "job"), ".json")]
        assert tried == ["identity-ada.json"], "a check ahead takes no try away"

        intake.following = lambda number: []
        assert await check(bruno) == 6
        assert len(run.identity("bruno").references) == 6
        with pytest.raises(IdentityError, match=r"nowhere\.png"):
            await check(dana)
        assert len(passes) == 1  # the models were loaded once for all of them

        assert await check(dataclasses.replace(chidi, photos=chidi.photos[:3], consent="another")) == 3
        assert (len(passes), run.identity("chidi").consent) == (2, "another")
        assert storage.list_files(run.path("identities"), "ahead.json") == []

        storage.write_json(run.path(ahead_uri("eve")), {})
        storage.write_bytes(run.path("identities/eve/photo-1.png"), b"a photo")
        await intake.forget("eve")  # her turn does not come
        await intake.forget("ada")  # whose turn came
        assert storage.list_files(run.path("identities/eve")) == []
        assert run.has("identities/ada/identity.parquet")

    asyncio.run(scenario())
