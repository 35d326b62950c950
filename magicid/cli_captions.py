"""`magicid identities caption`: a manifest with a caption for each photo."""

from __future__ import annotations

import json

import typer

from magicid.cli_errors import told_plainly


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("caption", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(caption)


@told_plainly
def caption(
    context: typer.Context,
    location: str = typer.Argument(..., help="a manifest or a folder of folders, on any fsspec URL"),
    out: str = typer.Option(..., "--out", help="the JSON-lines manifest to write, on any fsspec URL"),
    recipe_name: str = typer.Option("face-world", "--recipe", help="a shipped recipe or a .toml file"),
    device: str = typer.Option("auto", help="of the vision-language model: auto, cpu or cuda"),
) -> None:
    """Write a manifest in which every photo has a caption, by the recipe's vision-language model.

    Captions that are there stay. A photo that cannot be read is named and gets none. Exit code 1 if there is any.
    """
    from rich.console import Console
    from rich.progress import Progress

    from magicid import cli
    from magicid.captions import caption_row, record
    from magicid.identities import read_manifest
    from magicid.rewards.semantics import SemanticsReward
    from magicid.storage import write_bytes
    from magicid.weights import resolve

    settings = cli.load_recipe(recipe_name, context)
    rows, rejected = read_manifest(location)
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SemanticsReward.from_pretrained(
        resolve(settings.rewards.semantics), frames=settings.rewards.semantics_frames, device=device
    )
    lines = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("captions", total=sum(len(row.photos) for row in rows))
        for row in rows:
            captioned, failed = caption_row(row, model, settings, lambda: progress.advance(task))
            rejected += failed
            lines.append(json.dumps(record(captioned)))
    write_bytes(out, "".join(f"{line}\n" for line in lines).encode())
    if rejected:
        cli.show_rejected(rejected)
    typer.echo(f"{len(rows)} identities in {out}")
    if rejected:
        raise typer.Exit(cli.NOT_VALID)
