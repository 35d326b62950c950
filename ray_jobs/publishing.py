"""The last stages: adapters with their manifests, the report, and what the job prints at its end."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from magicid import adapters, storage
from magicid.evaluation import table
from magicid.repository import AdapterRef
from magicid.schema import Identity, MetricRow, Pair, Rejected
from ray_jobs.job import Job


def publish(
    job: Job,
    people: Sequence[Identity],
    pairs: dict[str, list[Pair]],
    sft: dict[str, AdapterRef],
    hpo: dict[str, AdapterRef],
    measured: Sequence[MetricRow],
) -> list[adapters.AdapterRef]:
    """Stage 8: one version per identity, with a manifest that says what it was made from."""
    published = []
    for person in people:
        if person.identity_id in hpo:
            one = functools.partial(publish_one, job, person, pairs, sft, hpo, measured)
            made: adapters.AdapterRef | None = job.attempt(f"publish {person.identity_id}", one, None)
            published += [made] if made else []
    return published


def publish_one(
    job: Job,
    person: Identity,
    pairs: dict[str, list[Pair]],
    sft: dict[str, AdapterRef],
    hpo: dict[str, AdapterRef],
    measured: Sequence[MetricRow],
) -> adapters.AdapterRef:
    """One identity's adapter and manifest."""
    name = person.identity_id
    manifest = adapters.AdapterManifest(
        owner=person.owner,
        consent=person.consent or "",
        base_sha256=job.base_sha256,
        recipe_sha256=job.recipe.for_identity(person.overrides).content_sha256,
        rank=job.recipe.lora.rank,
        alpha=job.recipe.lora.alpha,
        pairs_sha256=storage.sha256_json([pair.pair_id for pair in pairs[name]]),
        reference_sha256=sft[name].sha256,
        metrics=table.summary(measured, name, "hpo"),
    )
    return adapters.publish(job.run.location, name, storage.read_bytes(job.run.path(hpo[name].uri)), manifest)


def write_report(job: Job) -> str:
    """Stage 9: one self-contained HTML file."""
    from magicid.report import build_report

    job.run.write("rejected.parquet", job.rejected, Rejected)
    location = job.run.path("report.html")
    storage.write_bytes(location, build_report(job.run).encode())
    return location


def summarise(job: Job, published: Sequence[adapters.AdapterRef], measured: Sequence[MetricRow], report: str) -> None:
    """The end of the job: the table, the adapters, the report."""
    console = job.display.console
    if measured:
        console.print(table.render(table.table(measured)))
    for adapter in published:
        console.print(f"adapter  {_short(adapter.location)}", soft_wrap=True, highlight=False)
    console.print(f"report   {_short(report)}", soft_wrap=True, highlight=False)


def _short(location: str) -> str:
    """A local path below the working directory without it."""
    return location.removeprefix(os.getcwd() + os.sep)
