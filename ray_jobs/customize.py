"""The main job: photos of people in, one video adapter each out.

    python -m ray_jobs.customize --recipe face-world --identities examples/identities --out runs/demo

    photos ─ base + photo clips ─ SFT ─ trained clips ─ pairs ─ HPO ─ evaluation ─ publish      (each identity)

`customize_person` is the way of one identity; `driver.py` runs many of them at once on shared workers. Every step
writes under the run directory and is skipped when its result is there, so the same command resumes. A bad photo, clip
or identity is reported and set aside; the exit code is not 0 only when nothing could be done.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
import typer
from rich.console import Console
from rich.text import Text

from magicid import ledger, prompts, recipe, repository, storage
from magicid.attempts import Attempts
from magicid.backbones import base_sha256
from magicid.errors import MagicIDError
from magicid.lease import Lease
from magicid.manifests import ManifestRow
from magicid.recipe import Recipe
from magicid.repository import AdapterRef
from magicid.run import Run, training_uri
from magicid.schema import CURVE_CLIP, EVALUATION_CLIP, MOVING_CLIP, STATIC_CLIP, Identity, Made, Prompt, ScoredClip
from magicid.training import loggers
from magicid.weights import model_folders, resolve
from ray_jobs import pools, services, tasks
from ray_jobs.driver import Driver
from ray_jobs.fleet import Fleet
from ray_jobs.job import cause, connect, run_location, submission
from ray_jobs.progress import Display
from ray_jobs.publishing import published, summarise, write_report


async def customize_person(fleet: Fleet, row: ManifestRow) -> str:
    """One identity, from its manifest row to its published adapter; returns the version.

    Raises:
        MagicIDError: it cannot be customised; what it has until then is kept.
    """
    known = fleet.ledger.records[row.id]
    if known.state == ledger.DONE and await asyncio.to_thread(published, fleet.run, row.id, known.adapter):
        return str(known.adapter)
    fleet.progress(row.id, "check", 0, 1)
    person = await fleet.check(row)
    for warning in person.warnings:
        fleet.set_aside("photo", row.id, MagicIDError(warning, "replace the photo or its caption, or leave it out"))
    settings = fleet.recipe.for_identity(person.overrides)

    base = await base_clips(fleet, person.class_word)  # V_s, shared by all of one class word
    still = repository.static_clips(settings, fleet.base_sha256, person)  # V_id
    moving = repository.moving_clips(settings, fleet.base_sha256, person)
    photos = await fleet.score(row, "photo clips", still + moving)
    sft = await fleet.train(row, person, "sft", settings.sft.steps, photo_examples(photos, person))

    if not settings.hpo.steps:  # a row of the comparison: self-reconstruction alone
        return await finish(fleet, row, person, None, sft, sft)
    wanted = repository.trained_clips(fleet.recipe, fleet.base_sha256, training(fleet), person, sft)  # V_t
    trained = await fleet.score(row, "trained clips", wanted)
    copies = []
    if settings.selection.still_pairs:
        there = {clip.clip_id for clip in trained}
        of = [clip for clip in wanted if clip.clip_id in there]
        copies = await fleet.score(row, "still clips", repository.still_clips(of))
    fleet.progress(row.id, "pairs", 0, 1)
    names = [clip.clip_id for clip in (*base, *photos, *trained, *copies)]
    pairs = await fleet.tasks.run(tasks.choose_pairs, fleet.run.location, settings, row.id, names)
    fleet.display.say(f"pairs of {row.id}: " + ", ".join(f"{n} {k}" for k, n in pairs.counts.items()))
    hpo = await fleet.train(row, person, "hpo", settings.hpo.steps)
    return await finish(fleet, row, person, pairs, sft, hpo)


async def finish(
    fleet: Fleet, row: ManifestRow, person: Identity, pairs: tasks.Chosen | None, sft: AdapterRef, last: AdapterRef
) -> str:
    """Evaluate and publish the last adapter; returns its version, empty for extended tokens, which are no LoRA."""
    settings = fleet.recipe.for_identity(person.overrides)
    measured = await evaluate(fleet, row, person, pairs, sft, last)
    fleet.lease.check()
    fleet.progress(row.id, "publish", 0, 1)
    if settings.sft.tokens:
        return ""
    return await fleet.tasks.run(
        tasks.publish, fleet.run.location, settings, fleet.base_sha256, row.id, sft, last, measured
    )


async def base_clips(fleet: Fleet, class_word: str) -> list[Made]:
    """V_s with its motion and prompt rewards: made once per class word, for all identities."""

    def make() -> Awaitable[list[Made]]:
        wanted = repository.base_clips(fleet.recipe, fleet.base_sha256, training(fleet), class_word)
        return fleet.score(None, f"base clips ({class_word})", wanted)

    return await fleet.once(("base clips", class_word), make)


def photo_examples(clips: Sequence[Made | ScoredClip], person: Identity) -> list[dict[str, Any]]:
    """What SFT trains on: the identity's own photo clips, in a fixed order."""
    kinds = (STATIC_CLIP, MOVING_CLIP)
    own = [clip for clip in clips if clip.kind in kinds and clip.identity_id == person.identity_id]
    columns = ("clip_id", "latents_uri", "text_uri")
    return [{name: getattr(clip, name) for name in columns} for clip in sorted(own, key=lambda clip: clip.clip_id)]


async def evaluate(
    fleet: Fleet, row: ManifestRow, person: Identity, pairs: tasks.Chosen | None, sft: AdapterRef, hpo: AdapterRef
) -> list[str]:
    """The table: base, SFT only and HPO on held-out prompts, the same seeds, measured by networks of their own.

    Where it fails, the reason is set aside and what was trained is not lost. Returns the ids of the measured clips.
    """
    settings, heldout = fleet.recipe, [p for p in fleet.prompts if p.split == "heldout"]
    if not (settings.evaluation.clips and settings.evaluation.identity and heldout):
        return []

    def clips(
        method: str, of: Identity | None, adapter: AdapterRef | None, step: int = 0, kind: str = EVALUATION_CLIP
    ) -> list[Any]:
        return repository.evaluation_clips(
            settings, fleet.base_sha256, heldout, person.class_word, method, of, adapter, step, kind
        )

    own = settings.for_identity(person.overrides)
    sft_steps, steps = own.sft.steps, own.sft.steps + own.hpo.steps

    try:
        await fleet.once(  # made once; then each identity is measured against them
            ("base evaluation", person.class_word),
            lambda: fleet.score(None, f"held-out base ({person.class_word})", clips("base", None, None)),
        )
        wanted = clips("base", person, None) + clips("sft", person, sft, sft_steps)
        sampled = []
        if pairs:
            wanted += clips("hpo", person, hpo, steps)
            sampled = await asyncio.to_thread(validation_clips, fleet.run, person, pairs.prompt)
        await fleet.measure(row, wanted + sampled)
        kept = await asyncio.to_thread(kept_adapters, fleet.run, person, {"sft": 0, "hpo": sft_steps})
        curve = [c for method, adapter, step in kept for c in clips(method, person, adapter, step, CURVE_CLIP)]
        if curve:
            await fleet.measure(row, curve)
    except MagicIDError as error:
        fleet.set_aside("evaluation", row.id, error)
        return []
    return [clip.clip_id for clip in wanted]


def kept_adapters(run: Run, person: Identity, before: dict[str, int]) -> list[tuple[str, AdapterRef, int]]:
    """(stage, adapter, training steps in all) of what the trainer kept on its way; `before` each stage were so many."""
    found = []
    for stage, earlier in before.items():
        folder = training_uri(person.identity_id, stage, "steps")
        for file in storage.list_files(run.path(folder), ".safetensors"):
            name = file.rsplit("/", 1)[-1]
            adapter = AdapterRef(f"{folder}/{name}", storage.sha256_bytes(storage.read_bytes(file)))
            found.append((stage, adapter, earlier + int(name.removesuffix(".safetensors").removeprefix("step-"))))
    return found


def validation_clips(run: Run, person: Identity, prompt: str) -> list[Any]:
    """The samples that the trainer left as latents while it trained this identity."""
    folder = run.path(training_uri(person.identity_id, "hpo", "validation"))
    names = [file.rsplit("/", 1)[-1] for file in storage.list_files(folder, ".safetensors")]
    found = [training_uri(person.identity_id, "hpo", f"validation/{name}") for name in names]
    return repository.validation_clips(person, found, prompt)


def training(fleet: Fleet) -> list[Prompt]:
    """The prompts that clips for training are made from."""
    return [prompt for prompt in fleet.prompts if prompt.split == "training"]


def customize(settings: Recipe, identities_location: str, out: str, console: Console | None = None) -> int:
    """Run the whole job on the Ray cluster that is connected. Returns the number of adapters published."""
    run = Run(run_location(out))
    loggers.check(settings.training.loggers)
    for location in model_folders(settings):
        resolve(location)  # what is missing is said now, not after hours
    run.open(settings, base_sha256(settings))
    cluster = ray.cluster_resources()
    settings = pools.with_shared_gpus(settings, cluster.get("GPU", 0))
    with Display(console) as display:
        wanted, there = settings.resources.pool_cpus(), cluster.get("CPU", 0)
        if wanted >= there:
            display.say(
                f"the pools want {wanted:g} of {there:g} CPUs: nothing starts unless the cluster grows", "yellow"
            )
        lease = Lease.take(run, settings.fleet.lease_s, display.say, submission())
        try:
            return asyncio.run(_drive(settings, run, identities_location, display, lease))
        finally:
            lease.release()


async def _drive(settings: Recipe, run: Run, manifest: str, display: Display, lease: Lease) -> int:
    this = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: this and this.cancel())  # `ray job stop`
    fleet = Fleet(settings, run, base_sha256(settings), display, lease)
    try:
        storage.remove(run.path("attempts"))  # those of drivers that were killed: tries count within one start
        if not run.has("prompts.parquet"):
            run.write("prompts.parquet", prompts.load_prompts(settings.prompts), Prompt)
        fleet.prompts = run.read("prompts.parquet", Prompt)
        fleet.connect(services.on_ray(settings, run, fleet.name))
        await Driver(fleet, customize_person).run(manifest)
    finally:
        fleet.ledger.close()
    report = write_report(fleet)
    Attempts(run, fleet.name, 0).forget()
    storage.remove(run.path("ray_train"))
    return summarise(fleet, manifest, report)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    identities: str = typer.Option(
        ..., help="folder of folders, or a JSONL, CSV or Parquet manifest, on any fsspec URL"
    ),
    out: str = typer.Option(..., help="run directory, on any fsspec URL; the same one resumes"),
    recipe_name: str = typer.Option("face-world", "--recipe", help="a shipped recipe or a .toml file"),
) -> None:
    """Customise every identity. Any recipe key can follow as --section.key=value."""
    console = Console()
    try:
        settings = recipe.load(recipe_name, recipe.parse_overrides(context.args))
        connect(settings)
        done = customize(settings, identities, out, console)
    except MagicIDError as error:
        console.print(Text(f"error {error}", style="red"), soft_wrap=True)
        sys.exit(2)
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print(Text("stopped; run the same command again to go on", style="yellow"))
        sys.exit(3)
    except ray.exceptions.RayError as error:
        console.print(Text(f"error {cause(error)} — run the same command again to go on", style="red"), soft_wrap=True)
        sys.exit(2)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    app()
