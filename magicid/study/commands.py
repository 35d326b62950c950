"""`magicid study build` and `magicid study score`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import typer


def register(app: typer.Typer, told_plainly: Callable[[Any], Any]) -> None:
    """Add the commands to an app; `told_plainly` turns errors into one line."""
    study = typer.Typer(no_args_is_help=True, help="A page on which people compare methods, and its answers.")
    study.command("build")(told_plainly(build))
    study.command("score")(told_plainly(score))
    app.add_typer(study, name="study")


def build(
    run: str = typer.Argument(..., help="run directory whose people are shown"),
    methods: str = typer.Option("base,sft,hpo", help="methods to compare, with commas between"),
    out: str = typer.Option("study", help="folder for the page and its key"),
    sets: int = typer.Option(20, min=1, help="sets of clips that everybody sees"),
    seed: int = typer.Option(0, help="of the choice of sets"),
    others: list[str] = typer.Option([], "--results", help="rows of clips from elsewhere; may be given again"),  # noqa: B008
) -> None:
    """Make a static page: order hidden and shuffled, four questions a set, answers saved as one file."""
    from magicid.study import build as study

    names = [name.strip() for name in methods.split(",") if name.strip()]
    count = study.build(run, names, out, sets=sets, seed=seed, others=others)
    typer.echo(f"{count} sets of {len(names)} clips")
    typer.echo(f"page  {out}/{study.PAGE}  (put this folder on a web server)")
    typer.echo(f"key   {out}/{study.KEY}  (keep it: `magicid study score` needs it)")


def score(
    answers: list[str] = typer.Argument(..., help="files that the page saved"),  # noqa: B008
    key: str = typer.Option("study/key.json", help="the study's key"),
    out: str = typer.Option("", help="also write the figures to this JSON file"),
) -> None:
    """Preference rates and Bradley-Terry strengths with intervals."""
    from magicid import storage
    from magicid.study import score as study

    found = study.score(study.read(key, answers))
    typer.echo(study.markdown(found), nl=False)
    if out:
        storage.write_json(out, [asdict(row) for row in found])
