"""The main job: photos of people in, one video adapter each out.

    python -m ray_jobs.customize --recipe face-world --identities examples/identities --out runs/demo

    identities ─ prompts ─ base + photo clips ─ SFT ─ trained clips ─ pairs ─ HPO ─ evaluation ─ publish ─ report

Every stage writes under the run directory and is skipped when its result is there, so the same command resumes. A bad
photo, clip or identity is reported and set aside; the exit code is not 0 only when nothing could be done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray
import typer
from rich.console import Console
from rich.text import Text

from magicid import adapters, prompts, recipe, repository, storage
from magicid.attempts import Attempts
from magicid.backbones import base_sha256
from magicid.errors import MagicIDError
from magicid.identities import read_manifest
from magicid.recipe import Recipe
from magicid.repository import AdapterRef
from magicid.rewards.rows import reward_rows
from magicid.run import Run, training_uri
from magicid.schema import (
    STATIC_CLIP,
    Clip,
    Identity,
    MetricRow,
    Pair,
    Prompt,
    Rejected,
    RewardRow,
    ScoredClip,
    to_rows,
)
from magicid.selection import select_pairs, with_identity_reward
from magicid.weights import model_folders, resolve
from ray_jobs import pipeline, pools, slots
from ray_jobs.intake import check_identities
from ray_jobs.job import Job, cause, connect, run_location
from ray_jobs.progress import Display
from ray_jobs.publishing import publish, summarise, write_report
from ray_jobs.queue import Task

WEIGHTS_FILE = adapters.WEIGHTS_NAME


def customize(settings: Recipe, identities_location: str, out: str, console: Console | None = None) -> int:
    """Run the whole job on the Ray cluster that is connected. Returns the number of adapters published."""
    run = Run(run_location(out))
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
        job = Job(settings, run, display, base_sha256(settings))
        people = check_people(job, identities_location)
        texts = choose_prompts(job)
        training = [p for p in texts if p.split == "training"]
        heldout = [p for p in texts if p.split == "heldout"]

        shared = score(job, "base and photo clips", base_and_photo_clips(job, people, training))
        sft = train(job, "sft", people, {p.identity_id: photo_examples(shared, p) for p in people})
        trained = score(job, "trained clips", trained_clips(job, people, training, sft))
        pairs = {
            p.identity_id: choose_pairs(job, p, shared + trained, training) for p in people if p.identity_id in sft
        }
        examples = {identity_id: to_rows(chosen) for identity_id, chosen in pairs.items() if chosen}
        hpo = train(job, "hpo", [p for p in people if p.identity_id in examples], examples)
        measured: list[MetricRow] = job.attempt(
            "evaluation", lambda: evaluate(job, people, heldout, pairs, sft, hpo), []
        )
        published = publish(job, people, pairs, sft, hpo, measured)
        report = job.attempt("report", lambda: write_report(job), "none; see above")
        Attempts(run, job.name, 0).forget()
        storage.remove(run.path("ray_train"))
    summarise(job, published, measured, report)
    return len(published)


def check_people(job: Job, location: str) -> list[Identity]:
    """Stage 1: manifest rows -> checked identities; bad ones are set aside."""
    rows, unreadable = read_manifest(location)
    job.run.pin("identities", storage.sha256_json([asdict(row) for row in rows]))
    if not job.run.has("identities/identities.parquet"):
        people, rejected = check_identities(job.recipe, job.run, rows, job.name, job.display)
        rejected = unreadable + rejected
        job.run.write("identities/rejected.parquet", rejected, Rejected)
        job.run.write("identities/identities.parquet", people, Identity)
    for row in job.run.read("identities/rejected.parquet", Rejected):
        job.set_aside(row.kind, row.name, MagicIDError(row.problem, row.action))
    people = job.run.read("identities/identities.parquet", Identity)
    if not people:
        raise MagicIDError(f"no identity of {location} can be used", "correct what was set aside above")
    return people


def choose_prompts(job: Job) -> list[Prompt]:
    """Stage 2: the prompts of this run, kept with it."""
    if not job.run.has("prompts.parquet"):
        job.run.write("prompts.parquet", prompts.load_prompts(job.recipe.prompts), Prompt)
    return job.run.read("prompts.parquet", Prompt)


def base_and_photo_clips(job: Job, people: Sequence[Identity], training: Sequence[Prompt]) -> list[Clip]:
    """V_s, once per class word, and V_id of every identity."""
    wanted = []
    for class_word in sorted({p.class_word for p in people}):
        wanted += repository.base_clips(job.recipe, job.base_sha256, training, class_word)
    for person in people:
        wanted += repository.static_clips(job.recipe.for_identity(person.overrides), job.base_sha256, person)
    return wanted


def trained_clips(
    job: Job, people: Sequence[Identity], training: Sequence[Prompt], sft: dict[str, AdapterRef]
) -> list[Clip]:
    """V_t of every identity that has an SFT adapter."""
    wanted = []
    for person in people:
        if person.identity_id in sft:
            wanted += repository.trained_clips(job.recipe, job.base_sha256, training, person, sft[person.identity_id])
    return wanted


def score(job: Job, name: str, wanted: Sequence[Clip]) -> list[ScoredClip]:
    """Stages 4 and 5: generate and score clips; those that were given up are set aside."""

    def show(done: int, row: ScoredClip | None) -> None:
        job.display.show(name, done, len(wanted), (row.identity_id or "shared") if row else "")

    rows = pipeline.score(job.recipe, job.run, wanted, job.name, show)
    for row in rows:
        if row.error is not None:
            job.set_aside("clip", row.clip_id, MagicIDError(row.error, "the others go on; run again to try it again"))
    return [row for row in rows if row.error is None]


def photo_examples(clips: Sequence[ScoredClip], person: Identity) -> list[dict[str, Any]]:
    """What SFT trains on: the identity's own photo clips, in a fixed order."""
    own = [clip for clip in clips if clip.kind == STATIC_CLIP and clip.identity_id == person.identity_id]
    columns = ("clip_id", "latents_uri", "text_uri")
    return [{name: getattr(clip, name) for name in columns} for clip in sorted(own, key=lambda clip: clip.clip_id)]


def choose_pairs(job: Job, person: Identity, clips: Sequence[ScoredClip], training: Sequence[Prompt]) -> list[Pair]:
    """Stage 6: P_id and P_dy of one identity, with the reasons for what was dropped."""
    name = f"pairs/{person.identity_id}.parquet"
    pairs = job.run.read(name, Pair) if job.run.has(name) else []
    if not pairs:
        settings = job.recipe.for_identity(person.overrides).selection
        shared = {
            clip.clip_id for clip in repository.base_clips(job.recipe, job.base_sha256, training, person.class_word)
        }
        own = [c for c in clips if c.identity_id == person.identity_id or c.clip_id in shared]
        scored = with_identity_reward(own, person.references)
        selected = select_pairs(person.identity_id, scored, settings)
        rows = reward_rows(scored, selected, job.recipe.rewards)
        job.run.write(f"rewards/{person.identity_id}.parquet", rows, RewardRow)
        job.run.write(f"pairs/{person.identity_id}.rejected.parquet", selected.dropped, Rejected)
        job.run.write(name, selected.pairs, Pair)
        pairs = selected.pairs
    counts = {kind: sum(p.kind == kind for p in pairs) for kind in ("P_id", "P_dy")}
    job.display.say(f"pairs of {person.identity_id}: {counts['P_id']} P_id, {counts['P_dy']} P_dy")
    if not pairs:
        problem = MagicIDError("no preference pair could be made", f"see pairs/{person.identity_id}.rejected.parquet")
        job.set_aside("identity", person.identity_id, problem)
    return pairs


def train(
    job: Job,
    stage: str,
    people: Sequence[Identity],
    examples: dict[str, list[dict[str, Any]]],
) -> dict[str, AdapterRef]:
    """Stages 3 and 7: train every identity through one stage in the slots; returns the adapters that came out."""
    tasks = []
    for person in people:
        steps = _steps(job, person, stage)
        job.display.show(f"{stage} {person.identity_id}", 0, steps)
        if not job.run.has(training_uri(person.identity_id, stage, WEIGHTS_FILE)):
            payload = {
                "identity_id": person.identity_id,
                "overrides": person.overrides,
                "examples": examples[person.identity_id],
            }
            tasks.append(Task(person.identity_id, person.owner, stage, steps, person.priority, payload))
    for task_id, outcome in slots.train(job.recipe, job.run, tasks, job.display).items():
        if outcome.state != "done":
            problem = MagicIDError(f"{stage} failed: {outcome.error}", "its last good checkpoint is kept; run again")
            job.set_aside("identity", task_id, problem)
    trained = {}
    for person in people:
        uri = training_uri(person.identity_id, stage, WEIGHTS_FILE)
        if job.run.has(uri):
            steps = _steps(job, person, stage)
            job.display.show(f"{stage} {person.identity_id}", steps, steps)
            trained[person.identity_id] = AdapterRef(uri, storage.sha256_bytes(storage.read_bytes(job.run.path(uri))))
    return trained


def _steps(job: Job, person: Identity, stage: str) -> int:
    settings = job.recipe.for_identity(person.overrides)
    return settings.sft.steps if stage == "sft" else settings.hpo.steps


def evaluate(
    job: Job,
    people: Sequence[Identity],
    heldout: Sequence[Prompt],
    pairs: dict[str, list[Pair]],
    sft: dict[str, AdapterRef],
    hpo: dict[str, AdapterRef],
) -> list[MetricRow]:
    """The table: base, SFT only and HPO on held-out prompts, the same seeds, measured by networks of their own."""
    if not (job.recipe.evaluation.clips and job.recipe.evaluation.identity and heldout):
        return []
    wanted = []
    for person in people:
        for method, adapter in (
            ("base", None),
            ("sft", sft.get(person.identity_id)),
            ("hpo", hpo.get(person.identity_id)),
        ):
            if method == "base" or adapter is not None:
                wanted += repository.evaluation_clips(
                    job.recipe, job.base_sha256, heldout, person.class_word, method, person, adapter
                )
        if person.identity_id in hpo:
            wanted += validation_clips(job, person, pairs)

    def show(done: int, row: MetricRow | None) -> None:
        job.display.show("evaluation", done, len(wanted), f"{row.method} {row.identity_id}" if row else "")

    rows = pipeline.evaluate(job.recipe, job.run, wanted, people, job.name, show)
    return [row for row in rows if row.method != "validation"]


def validation_clips(job: Job, person: Identity, pairs: dict[str, list[Pair]]) -> list[Clip]:
    """The samples that the trainer left as latents while it trained this identity."""
    folder = job.run.path(training_uri(person.identity_id, "hpo", "validation"))
    names = [file.rsplit("/", 1)[-1] for file in storage.list_files(folder, ".safetensors")]
    found = [training_uri(person.identity_id, "hpo", f"validation/{name}") for name in names]
    return repository.validation_clips(person, found, pairs[person.identity_id][0].prompt)


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
        published = customize(settings, identities, out, console)
    except MagicIDError as error:
        console.print(Text(f"error {error}", style="red"), soft_wrap=True)
        sys.exit(2)
    except ray.exceptions.RayError as error:
        console.print(Text(f"error {cause(error)} — run the same command again to go on", style="red"), soft_wrap=True)
        sys.exit(2)
    sys.exit(0 if published else 1)


if __name__ == "__main__":
    app()
