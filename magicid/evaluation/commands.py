"""The part of the command line that measures: `magicid evaluate` and `magicid results`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from magicid.evaluation.folder import ForeignClip, Person
    from magicid.evaluation.metrics import Metrics
    from magicid.recipe import Recipe

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
PART = 16  # clips a part: what is lost at most when the command is stopped
CLIPS = typer.Option(
    ..., "--clips", help="folder with clips.jsonl, or of <identity>/<prompt>.mp4; of any videos without --identities"
)
IDENTITIES = typer.Option("", "--identities", help="manifest of the people in the clips; without it nobody is compared")
NAME = typer.Option(..., "--name", help="what the method is called in tables, such as ID-Animator")
LOCATIONS = typer.Argument(..., help="runs, and folders or files of rows; LOCATION=NAME names the methods of one")
OUT = typer.Option(..., "--out", help="folder for the rows; the same one resumes")


def register(app: typer.Typer, told_plainly: Callable[[Any], Any]) -> None:
    """Add the commands to an app; `told_plainly` turns errors into one line."""
    app.command(context_settings=EXTRA)(told_plainly(evaluate))
    app.command("results")(told_plainly(show_results))


def evaluate(
    context: typer.Context,
    clips: str = CLIPS,
    identities: str = IDENTITIES,
    name: str = NAME,
    out: str = OUT,
    recipe_name: str = typer.Option("face-world", "--recipe", help="whose section `evaluation` names the networks"),
    device: str = typer.Option("cpu", help="torch device of the networks"),
    threads: int = typer.Option(1, min=1, help="clips that faces and flow are looked for in at the same time"),
) -> None:
    """Measure clips made elsewhere. Any recipe key can follow as --section.key=value."""
    from magicid import recipe
    from magicid.evaluation import folder
    from magicid.evaluation.metrics import Metrics

    settings = recipe.load(recipe_name, recipe.parse_overrides(context.args))
    metrics = Metrics.from_recipe(settings, device, threads)
    waiting, people = prepare(settings, metrics, clips, identities, out)
    typer.echo(f"{len(waiting)} clips to measure, {len(people) if people else 'no'} people")
    for part in parts(waiting):
        save(out, [folder.measure_one(clip, people, metrics, name) for clip in part])
    typer.echo(f"rows in {out}; `magicid results {out}` makes the tables")


def prepare(
    settings: Recipe, metrics: Metrics, clips: str, identities: str, out: str
) -> tuple[list[ForeignClip], dict[str, Person] | None]:
    """The clips of a folder that `out` has no row of yet, and the people of a manifest; None without a manifest."""
    from magicid import storage
    from magicid.evaluation import folder, results
    from magicid.manifests import read_manifest
    from magicid.photos import decode_photo

    found = folder.list_clips(clips, of_people=bool(identities))
    known = {row.clip_id for row in results.read([out])} if storage.list_files(out, ".parquet") else set()
    waiting = [clip for clip in found if clip.clip_id not in known]
    if not identities:
        return waiting, None
    rows, _ = read_manifest(identities)
    people = folder.read_people(
        rows, metrics, lambda location: decode_photo(storage.read_bytes(location), location, settings.identities)
    )
    return waiting, people


def parts(clips: list[ForeignClip]) -> Iterator[list[ForeignClip]]:
    """The clips in parts that are written as wholes."""
    for start in range(0, len(clips), PART):
        yield clips[start : start + PART]


def save(out: str, rows: list[Any]) -> None:
    """Add a part of rows to a folder."""
    from magicid import storage
    from magicid.evaluation import results

    results.write(storage.join(out, f"part-{uuid.uuid4().hex}.parquet"), rows)


def show_results(
    locations: list[str] = LOCATIONS,
    out: str = typer.Option("results", help="folder for results.md, results.json and the figures"),
    threshold: float | None = typer.Option(
        None, help="of face_sim: also tell the share of clips above it, which are verified as their person"
    ),
    reference: str = typer.Option(
        "", help="rows the Fréchet video distance is taken to: what `magicid evaluate` wrote of a reference folder"
    ),
) -> None:
    """Merge rows into tables and figures, the paper's numbers beside them."""
    from magicid.evaluation import document, results

    rows = results.read(locations)
    files = document.write(rows, out, results.read([reference]) if reference else [], threshold)
    typer.echo(f"{len(rows)} clips of {len({row.method for row in rows})} methods")
    for file in files:
        typer.echo(f"{out}/{file}")
