"""The command line: look before a run is started, and at what a run has made. Training itself is a Ray job.

magicid recipes
magicid check --recipe hunyuan-480p --out s3://bucket/run --hpo.steps=2000
magicid identities examples/identities --recipe face-world
magicid identities caption people.jsonl --out captioned.jsonl --recipe face-world
magicid identities delete ID --run RUN (or a folder of runs) --proof FILE
magicid adapters list RUN | show RUN IDENTITY (or IDENTITY@VERSION) | verify RUN
magicid adapters alias RUN IDENTITY@VERSION ALIAS | rollback RUN IDENTITY ALIAS | delete RUN IDENTITY (or @VERSION)
magicid status RUN [--watch] [--json] [--failed]
magicid retry RUN ID... (or --failed, --all) | cancel RUN ID...
magicid report RUN
magicid evaluate --clips DIR --identities M --name NAME --out RESULTS
magicid results RESULTS... --out DIR
magicid study build RUN --methods base,sft,hpo --out DIR | score ANSWERS... --key DIR/key.json
magicid provenance CLIP
python -m ray_jobs.customize --recipe ... --identities ... --out RUN
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
import typer.core

from magicid import cli_captions, cli_fleet
from magicid.cli_errors import told_plainly
from magicid.evaluation import commands as evaluation_commands
from magicid.study import commands as study_commands

if TYPE_CHECKING:
    from magicid.adapters import Alias
    from magicid.recipe import Recipe
    from magicid.schema import Rejected

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
adapters_app = typer.Typer(no_args_is_help=True, help="The published adapters of a run.")
app.add_typer(adapters_app, name="adapters")
cli_fleet.register(app)


class _ManifestByDefault(typer.core.TyperGroup):
    """`magicid identities people.jsonl` is `magicid identities list people.jsonl`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["list", *args]
        return super().parse_args(ctx, args)


identities_app = typer.Typer(
    cls=_ManifestByDefault, no_args_is_help=True, help="What a manifest holds, and the removal of a person from runs."
)
app.add_typer(identities_app, name="identities")
cli_captions.register(identities_app)

NOT_VALID, NO_PROVENANCE = 1, 3  # exit codes; 2 is an error
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
RECIPE = typer.Option("face-world", "--recipe", help="a shipped recipe or a .toml file")
RUN = typer.Argument(..., help="run directory, on any fsspec URL")
RUNS = typer.Option(..., "--run", help="run directory, or a folder of them; may be given again")
ADAPTER = typer.Argument(..., help="IDENTITY or IDENTITY@VERSION")
IDENTITY = typer.Argument(..., help="an identity with published adapters")
_STYLES = {"error": "red", "warning": "yellow", "ok": "dim"}


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


@identities_app.command("list", context_settings=EXTRA)
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
    from magicid.identities import check_consent, read_manifest
    from magicid.schema import Rejected

    found, rejected = read_manifest(location)
    usable = []
    for row in found:
        try:
            check_consent(row, settings.for_identity(row.overrides).identities)
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


@identities_app.command("delete")
@told_plainly
def delete_identity(
    identity: str = typer.Argument(..., help="the person's id"),
    runs: list[str] = RUNS,
    yes: bool = typer.Option(False, "--yes", help="do not ask"),
    proof: str = typer.Option("", help="write what was removed, and what the scan saw, to this JSON file"),
) -> None:
    """Remove everything made of a person from runs, for good, then look at every file that is left.

    Exit code 1 when something still names the person. An endpoint's videos are its own: DELETE /v1/identities/ID first.
    """
    from magicid import erasure, lease, storage
    from magicid.erasure_proof import scan
    from magicid.run import Run

    places = list(dict.fromkeys(place for run in runs for place in erasure.find_runs(run)))
    if not yes:
        typer.confirm(f"Remove everything made of {identity} from {', '.join(places)}, for good?", abort=True)
    told: list[dict[str, Any]] = []
    for place in places:
        marks = erasure.traces_of(Run(place), identity)
        gone = erasure.delete(place, identity)
        left = scan(place, identity, marks)
        for name in gone:
            typer.echo(f"removed {name}")
        for name, why in left.found:
            typer.echo(f"{name} still names {identity}: {why}", err=True)
        looked = ", ".join(f"{count} {how}" for how, count in sorted(left.scanned.items()))
        nothing = "" if gone else f"nothing of {identity} was there; "
        verdict = f"{len(left.found)} name {identity}" if left.found else f"none names {identity}"
        typer.echo(f"{storage.public_name(place)}: {nothing}looked at what is left ({looked}): {verdict}")
        driven = lease.alive(lease.newest(Run(place)))
        if driven:
            typer.echo("a driver is at work there: it removes what it has in hand; run this again after it", err=True)
        looked_at = {"scanned": dict(left.scanned), "named_in": left.found, "driver_at_work": driven}
        told.append({"run": place, "removed": gone, **looked_at})
    if proof:
        storage.write_json(proof, {"identity_sha256": erasure.tombstone(identity), "at": now(), "runs": told})
    if any(run["named_in"] for run in told):
        typer.echo("is a driver still at work there? Run the same command again when it has let go", err=True)
        raise typer.Exit(1)


@adapters_app.command("list")
@told_plainly
def list_adapters(run: str = RUN) -> None:
    """List the published adapters of a run, oldest first, with the aliases that stand for them."""
    found = published(run)
    named = {identity_id: alias_names(run, identity_id) for identity_id in {a.identity_id for a in found}}
    rows = [
        [a.identity_id, a.version, a.created, a.base[:12], ", ".join(named[a.identity_id].get(a.version, []))]
        for a in found
    ]
    show(["identity", "version", "created", "base", "aliases"], rows)


@adapters_app.command("show")
@told_plainly
def show_adapter(run: str = RUN, adapter: str = ADAPTER) -> None:
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


@adapters_app.command("alias")
@told_plainly
def set_alias(
    run: str = RUN,
    adapter: str = typer.Argument(..., help="IDENTITY@VERSION"),
    alias: str = typer.Argument(..., help="a name such as prod: letters, digits, - and _"),
    canary: str | None = typer.Option(None, help="another version, which gets --share of the requests"),
    share: float = typer.Option(0.0, help="above 0, at most 1"),
) -> None:
    """Let an alias stand for a version. The endpoint follows within seconds; `rollback` undoes it."""
    from magicid import adapters

    identity_id, _, version = adapter.partition("@")
    told_alias(adapters.set_alias(run, identity_id, alias, version, canary_version=canary, canary_share=share), alias)


@adapters_app.command("rollback")
@told_plainly
def roll_back(run: str = RUN, identity: str = IDENTITY, alias: str = typer.Argument(...)) -> None:
    """End the canary of an alias if one runs, else let it stand for the version before."""
    from magicid import adapters

    told_alias(adapters.rollback(run, identity, alias), alias)


@adapters_app.command("delete")
@told_plainly
def delete_adapters(
    run: str = RUN,
    adapter: str = ADAPTER,
    yes: bool = typer.Option(False, "--yes", help="do not ask"),
) -> None:
    """Remove one version for good, or with IDENTITY alone all versions and aliases."""
    from magicid import adapters

    identity_id, _, version = adapter.partition("@")
    if not yes:
        typer.confirm(f"Remove {adapter if version else f'all adapters of {identity_id}'} from {run}?", abort=True)
    for removed in adapters.delete(run, identity_id, version or None):
        typer.echo(f"removed {identity_id}@{removed}")


@app.command()
@told_plainly
def provenance(
    file: str = typer.Argument(..., help="an MP4, PNG or JPEG, on any fsspec URL"),
    root: str | None = typer.Option(None, help="PEM file of the root certificate that the signer must have"),
) -> None:
    """Say what a clip says of its origin. Exit code 0: valid, 1: changed or of another signer, 3: says nothing."""
    from magicid import storage
    from magicid.provenance import INVALID, NONE, read

    found = read(storage.read_bytes(file), storage.read_bytes(root) if root else None)
    foreign = root is not None and found.state != NONE and not found.trusted
    typer.echo(found.state if found.state != INVALID else "not valid")
    if found.state != NONE:
        trust = (
            "trusted" if found.trusted else f"not signed under {root}" if foreign else "anybody: give --root to check"
        )
        rows = [["signed by", f"{found.signed_by or 'unknown'} ({trust})"]]
        rows += [["made by AI", "yes" if found.ai_generated else "not said"]]
        if found.claim:
            claim = found.claim
            rows += [["generator", claim.generator or ""], ["base model", f"{claim.base} {claim.base_sha256}"]]
            rows += [["adapter", claim.adapter_version or "none"], ["created", claim.created]]
        show(["", ""], rows)
    for problem in found.problems:
        typer.echo(problem)
    if found.state == NONE:
        raise typer.Exit(NO_PROVENANCE)
    if found.state == INVALID or foreign:
        raise typer.Exit(NOT_VALID)


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
    from magicid import adapters, storage
    from magicid.errors import AdapterError, StorageError

    found = []
    files = storage.list_files(storage.join(run, "adapters"))
    aliases = f"/{adapters.ALIASES_NAME}"
    for location in sorted({file.rsplit("/", 1)[0] for file in files if not file.endswith(aliases)}):
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


def alias_names(run: str, identity_id: str) -> dict[str, list[str]]:
    """Version -> the aliases that stand for it. A file that is damaged is said, once, and hides no adapter."""
    from magicid import adapters
    from magicid.errors import AdapterError

    named: dict[str, list[str]] = {}
    try:
        for name, alias in sorted(adapters.aliases(run, identity_id).items()):
            named.setdefault(alias.version, []).append(name)
            if alias.canary_version is not None:
                named.setdefault(alias.canary_version, []).append(f"{name} canary {alias.canary_share:.0%}")
    except AdapterError as error:
        typer.echo(f"warning {error}", err=True)
    return named


def now() -> str:
    """The time, UTC, as files and lists show it."""
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")


def told_alias(alias: Alias, name: str) -> None:
    """Print what an alias stands for now."""
    canary = f", {alias.canary_version} for {alias.canary_share:.0%} of the requests" if alias.canary_version else ""
    past = f"; before: {alias.previous[-1]}" if alias.previous else ""
    typer.echo(f"{name} is {alias.version}{canary}{past}")


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


evaluation_commands.register(app, told_plainly)
study_commands.register(app, told_plainly)

if __name__ == "__main__":
    app()
