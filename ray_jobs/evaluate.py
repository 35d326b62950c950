"""Clips made elsewhere, measured on a cluster: `magicid evaluate` on Ray Data.

    python -m ray_jobs.evaluate --clips DIR --identities M --name ID-Animator --out RESULTS --recipe hunyuan-480p

One actor holds the networks; each clip is decoded once. Rows are written in parts as they come, and clips with a row
are not measured again.
"""

from __future__ import annotations

import sys
from typing import Any

import pyarrow as pa
import ray
import typer
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.text import Text

from magicid import recipe, schema
from magicid.errors import MagicIDError
from magicid.evaluation import commands, folder
from magicid.evaluation.metrics import Metrics
from magicid.recipe import Recipe
from magicid.schema import MetricRow
from ray_jobs import pools
from ray_jobs.job import connect
from ray_jobs.stages import device, limit_threads


class MeasureForeign:
    """One-to-one over clips: Arrow batch of locations in, MetricRows out."""

    def __init__(self, settings: dict[str, Any], people: Any, method: str) -> None:
        self.recipe = Recipe.model_validate(settings)
        limit_threads(self.recipe.resources.threads)
        self.metrics = Metrics.from_recipe(self.recipe, device=device())
        self.people, self.method = ray.get(people), method

    def __call__(self, batch: pa.Table) -> pa.Table:
        clips = [folder.ForeignClip(**row) for row in batch.to_pylist()]
        rows = [folder.measure_one(clip, self.people, self.metrics, self.method) for clip in clips]
        return pa.Table.from_pylist(schema.to_rows(rows), schema=schema.arrow_schema(MetricRow))


def evaluate(settings: Recipe, clips: str, identities: str, name: str, out: str) -> int:
    """Measure a folder on the cluster that is connected; returns how many clips were measured now."""
    metrics = Metrics.from_recipe(settings)
    waiting, people = commands.prepare(settings, metrics, clips, identities, out)
    if not waiting:
        return 0
    pools.configure()
    pool = settings.resources.identity
    measured = ray.data.from_items([dict(vars(clip)) for clip in waiting]).map_batches(
        MeasureForeign,
        fn_constructor_args=(settings.model_dump(mode="json"), ray.put(people), name),
        compute=ActorPoolStrategy(min_size=pool.min_size, max_size=max(pool.min_size, pool.max_size)),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        batch_size=commands.PART,
        batch_format="pyarrow",
    )
    batch: pa.Table
    for batch in measured.iter_batches(batch_size=None, batch_format="pyarrow"):
        commands.save(out, [schema.from_row(MetricRow, row) for row in batch.to_pylist()])
    return len(waiting)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings=commands.EXTRA)
def main(
    context: typer.Context,
    clips: str = commands.CLIPS,
    identities: str = commands.IDENTITIES,
    name: str = commands.NAME,
    out: str = commands.OUT,
    recipe_name: str = typer.Option("face-world", "--recipe", help="whose section `evaluation` names the networks"),
) -> None:
    """Measure clips made elsewhere. Any recipe key can follow as --section.key=value."""
    console = Console()
    try:
        settings = recipe.load(recipe_name, recipe.parse_overrides(context.args))
        connect(settings)
        done = evaluate(settings, clips, identities, name, out)
    except MagicIDError as error:
        console.print(Text(f"error {error}", style="red"), soft_wrap=True)
        sys.exit(2)
    console.print(f"{done} clips measured; rows in {out}", highlight=False)


if __name__ == "__main__":
    app()
