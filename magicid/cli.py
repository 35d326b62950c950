"""The command line: look before a run is started, and at what a run has made. Training itself is a Ray job.

magicid recipes
magicid check --recipe hunyuan-480p --out s3://bucket/run --hpo.steps=2000
magicid identities examples/identities --recipe face-world
magicid adapters list RUN | show RUN IDENTITY (or IDENTITY@VERSION) | verify RUN
magicid report RUN
python -m ray_jobs.customize --recipe ... --identities ... --out RUN
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from magicid.recipe import Recipe
    from magicid.schema import Rejected

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
adapters_app = typer.Typer(no_args_is_help=True, help="The published adapters of a run.")
app.add_typer(adapters_app, name="adapters")

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
RECIPE = typer.Option("face-world", "--recipe", help="a shipped recipe or a .toml file")
RUN = typer.Argument(..., help="run directory, on any fsspec URL")
_STYLES = {"error": "red", "warning": "yellow", "ok": "dim"}

F = TypeVar("F", bound=Callable[..., Any])


def told_plainly(command: F) -> F:
    """Turns a MagicIDError into one line and exit code 2."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        from magicid.errors import MagicIDError

        try:
            return command(*arguments, **options)
        except MagicIDError as error:
            typer.echo(f"error {' '.join(str(error).split())}", err=True)
            sys.exit(2)

    return wrapped  # type: ignore[return-value]


@app.command()
@told_plainly
def recipes() -> None:
    """List the shipped recipes."""
    from magicid import recipe

    rows = [[name, summary(recipe.load(name))] for name in recipe.shipped()]
    show(["recipe", "what it is"], rows)


@app.command(context_settings=EXTRA)
@told_plainly
def check(
    context: typer.Context,
    recipe_name: str = RECIPE,
    out: str = typer.Option("", help="run directory to be written, on any fsspec URL"),
    cpus: float | None = typer.Option(None, help="CPUs of the whole cluster; without it: of this machine"),
    gpu_gib: float | None = typer.Option(None, help="memory of one GPU in GiB; without it: of this machine's smallest"),
) -> None:
    """Say what a run would lack, before hours are spent. Any recipe key can follow as --section.key=value."""
    settings = load_recipe(recipe_name, context)
    from magicid.check import check as find

    findings = find(settings, out or None, cpus=cpus, gpu_gib=gpu_gib)
    if findings:
        rows = [[finding.level, finding.subject, finding.problem, finding.action] for finding in findings]
        show(["level", "subject", "finding", "what to do"], rows, styles=_STYLES)
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        typer.echo(f"{errors} {'error' if errors == 1 else 'errors'}: the run would fail")
        raise typer.Exit(1)
    typer.echo(f"recipe {settings.name} is ready to run")


@app.command(context_settings=EXTRA)
@told_plainly
def identities(
    context: typer.Context,
    location: str = typer.Argument(
        ..., help="folder of folders, or a JSONL, CSV or Parquet manifest, on any fsspec URL"
    ),
    recipe_name: str = RECIPE,
) -> None:
    """Read a manifest and say what it holds; photos are not opened and no model is loaded."""
    settings = load_recipe(recipe_name, context)
    from magicid.errors import MagicIDError
    from magicid.identities import read_manifest
    from magicid.schema import Rejected

    found, rejected = read_manifest(location)
    usable = []
    for row in found:
        try:
            settings.for_identity(row.overrides)
        except MagicIDError as error:
            rejected.append(Rejected("identity", row.id, error.problem, error.action))
            continue
        if len(row.photos) < settings.identities.min_photos:
            problem = f"photos: {len(row.photos)}; the recipe wants at least {settings.identities.min_photos}"
            rejected.append(Rejected("identity", row.id, problem, "add photos, or lower identities.min_photos"))
            continue
        overrides = ", ".join(f"{key}={value}" for key, value in row.overrides.items())
        usable.append(
            [
                row.id,
                row.owner,
                str(len(row.photos)),
                row.class_word,
                row.consent or "none",
                str(row.priority),
                overrides,
            ]
        )
    if usable:
        show(["identity", "owner", "photos", "class word", "consent", "priority", "overrides"], usable)
    if rejected:
        show_rejected(rejected)
    typer.echo(f"{len(usable)} of {len(usable) + len(rejected)} identities can be tried")
    if not usable:
        raise typer.Exit(1)


@adapters_app.command("list")
@told_plainly
def list_adapters(run: str = RUN) -> None:
    """List the published adapters of a run, oldest first."""
    show(
        ["identity", "version", "created", "base"],
        [[a.identity_id, a.version, a.created, a.base[:12]] for a in published(run)],
    )


@adapters_app.command("show")
@told_plainly
def show_adapter(run: str = RUN, adapter: str = typer.Argument(..., help="IDENTITY or IDENTITY@VERSION")) -> None:
    """Print the manifest of an adapter, the newest one where no version is named."""
    from magicid.errors import AdapterError

    identity_id, _, version = adapter.partition("@")
    everything = published(run)
    found = [a for a in everything if a.identity_id == identity_id and a.version.startswith(version)]
    if not found:
        known = ", ".join(f"{a.identity_id}@{a.version}" for a in everything)
        raise AdapterError(f"run {run} has no adapter {adapter}", f"there are: {known}")
    typer.echo(json.dumps(found[-1].manifest | {"location": found[-1].location}, indent=2, sort_keys=True))


@adapters_app.command("verify")
@told_plainly
def verify_adapters(run: str = RUN) -> None:
    """Check every adapter of a run against its manifest; exit code 1 when one is damaged."""
    from magicid import adapters
    from magicid.errors import AdapterError

    rows, damaged = [], 0
    for adapter in published(run):
        try:
            adapters.verify(adapter.location)
            rows.append([adapter.identity_id, adapter.version, "whole", ""])
        except AdapterError as error:
            damaged += 1
            rows.append([adapter.identity_id, adapter.version, "error", str(error)])
    show(["identity", "version", "state", "why"], rows, styles=_STYLES)
    if damaged:
        raise typer.Exit(1)


@app.command()
@told_plainly
def report(
    run: str = RUN, open_path: bool = typer.Option(False, "--open-path", help="open it in the browser afterwards")
) -> None:
    """Build report.html of a run again."""
    from magicid import storage
    from magicid.errors import StorageError
    from magicid.report import build_report
    from magicid.run import Run

    place = Run(run)
    if not place.has("run.json"):
        raise StorageError(f"{run} is not a run directory: it has no run.json", "give the --out of a run")
    location = place.path("report.html")
    storage.write_bytes(location, build_report(place).encode())
    typer.echo(location)
    if open_path:
        typer.launch(location)


def load_recipe(name: str, context: typer.Context) -> Recipe:
    """The recipe with the overrides that follow the options."""
    from magicid import recipe

    return recipe.load(name, recipe.parse_overrides(context.args))


def summary(settings: Recipe) -> str:
    """One line on a recipe."""
    video, text = settings.sampling, settings.prompts.name
    return (
        f"{settings.backbone.kind} at {settings.backbone.path}, {video.frames} frames of {video.width}x{video.height}, "
        f"prompts {text}, {settings.sft.steps} SFT and {settings.hpo.steps} HPO steps"
    )


@dataclass(frozen=True)
class Adapter:
    """An adapter folder of a run and what its manifest says; empty where it says nothing."""

    identity_id: str
    version: str
    location: str
    manifest: dict[str, Any]

    @property
    def created(self) -> str:
        return str(self.manifest.get("created", ""))

    @property
    def base(self) -> str:
        return str(self.manifest.get("base_sha256", ""))


def published(run: str) -> list[Adapter]:
    """Every adapter folder of a run, damaged or not, by identity, oldest first. Raises AdapterError for none at all."""
    from magicid import storage
    from magicid.errors import AdapterError, StorageError

    found = []
    for location in sorted({file.rsplit("/", 1)[0] for file in storage.list_files(storage.join(run, "adapters"))}):
        try:
            manifest = storage.read_json(storage.join(location, "manifest.json"))
        except StorageError:  # `verify` says why
            manifest = {}
        identity_id, version = location.split("/")[-2:]
        found.append(Adapter(identity_id, version, location, manifest if isinstance(manifest, dict) else {}))
    if not found:
        raise AdapterError(
            f"run {run} has no published adapter", "let the run finish; `magicid report` shows how far it came"
        )
    return sorted(found, key=lambda adapter: (adapter.identity_id, adapter.created, adapter.version))


def show(heads: list[str], rows: list[list[str]], styles: dict[str, str] | None = None) -> None:
    """Print a table; rows whose first or third cell is a key of `styles` take that colour."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for head in heads:
        drawn.add_column(head, overflow="fold")
    for row in rows:
        style = next((colour for key, colour in (styles or {}).items() if key in row), None)
        drawn.add_row(*(escape(cell) for cell in row), style=style)
    Console(highlight=False).print(drawn)


def show_rejected(rejected: list[Rejected]) -> None:
    """Print what cannot be used, and why."""
    show(["cannot be used", "why", "what to do"], [[r.name, r.problem, r.action] for r in rejected])


if __name__ == "__main__":
    app()
