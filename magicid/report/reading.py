"""What the report shows, read from a run directory. Whatever is missing or unreadable is left out and said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from magicid import storage
from magicid.errors import MagicIDError
from magicid.run import Run, training_uri
from magicid.schema import BASE_CLIP, REWARDED, Identity, MetricRow, Pair, Rejected, ScoredClip
from magicid.selection import with_identity_reward

STAGES = ("sft", "hpo")
LogRows = list[dict[str, float]]
T = TypeVar("T")


@dataclass(frozen=True)
class Person:
    """One identity and all that was made for it.

    `clips` are its V_t and V_id and the V_s made for its class word, with R_id against its own references.
    `pairs` is null where the selection did not happen. `validation` holds (step, URI) by rising step.
    """

    identity: Identity
    clips: list[ScoredClip]
    pairs: list[Pair] | None
    dropped: list[Rejected]
    logs: dict[str, LogRows]
    validation: list[tuple[int, str]]
    undecoded: int  # validation samples kept as latents only
    evaluation: list[MetricRow]
    manifests: list[dict[str, Any]]  # oldest first


@dataclass(frozen=True)
class Contents:
    """A whole run. Times are UTC; `begun` and `ended` are null where the storage keeps none."""

    run: Run
    recipe_name: str
    recipe_toml: str
    version: str  # of magicid, when the run was begun
    begun: datetime | None
    ended: datetime | None
    people: list[Person]
    evaluation: list[MetricRow]
    clips: int
    rejected: list[Rejected]
    unreadable: list[str] = field(default_factory=list)
    left_out: int = 0  # identities beyond the limit

    @property
    def bases(self) -> list[str]:
        """Hashes of the base models the adapters were made for."""
        found = (str(m["base_sha256"]) for person in self.people for m in person.manifests if m.get("base_sha256"))
        return sorted(set(found))


def read(run: Run, limit: int) -> Contents:
    """Read a run directory, finished or not; of more than `limit` identities, the first."""
    unreadable: list[str] = []

    def attempt(make: Callable[[], T], otherwise: T) -> T:
        try:
            return make()
        except MagicIDError as error:
            unreadable.append(str(error))
            return otherwise

    def table(name: str, cls: type[T]) -> list[T]:
        return attempt(lambda: run.read(name, cls), []) if run.has(name) else []

    marker: dict[str, Any] = attempt(lambda: storage.read_json(run.path("run.json")), {}) if run.has("run.json") else {}
    toml = attempt(lambda: storage.read_bytes(run.path("recipe.toml")).decode(), "") if run.has("recipe.toml") else ""

    def clips(folder: str) -> list[ScoredClip]:
        return _latest(attempt(lambda: run.read_parts(f"scored/{folder}", ScoredClip), []))

    shared = clips("_shared")
    rejected = table("rejected.parquet", Rejected)

    def person(name: str) -> Person | None:
        identity = attempt(lambda: run.identity(name), None)
        if identity is None:
            return None
        steps, undecoded = _validation(run, name)
        logs = {stage: _log(attempt, run, training_uri(name, stage, "log.parquet")) for stage in STAGES}
        files = storage.list_files(run.path("adapters", name), "manifest.json")
        manifests = [attempt(partial(storage.read_json, file), None) for file in files]
        return Person(
            identity=identity,
            clips=_of_person(identity, clips(name), shared),
            pairs=table(f"pairs/{name}.parquet", Pair) if run.has(f"pairs/{name}.parquet") else None,
            dropped=table(f"pairs/{name}.rejected.parquet", Rejected),
            logs={stage: rows for stage, rows in logs.items() if rows},
            validation=steps,
            undecoded=undecoded,
            evaluation=_one_each(attempt(lambda: run.read_parts(f"evaluation/{name}", MetricRow), [])),
            manifests=sorted((m for m in manifests if isinstance(m, dict) and m), key=lambda m: str(m.get("created"))),
        )

    none: list[str] = []
    names = attempt(run.identity_ids, none)
    people = [found for name in names[:limit] if (found := person(name)) is not None]
    evaluation = [row for found in people for row in found.evaluation]
    return Contents(
        run=run,
        recipe_name=str(marker.get("recipe", "unknown recipe")),
        recipe_toml=toml,
        version=str(marker.get("magicid", "unknown")),
        begun=_modified(run, "run.json"),
        ended=_modified(run, "rejected.parquet"),
        people=people,
        evaluation=evaluation,
        clips=len({clip.clip_id for found in people for clip in found.clips})
        + len({row.clip_id for row in evaluation if row.error is None}),
        rejected=rejected,
        unreadable=unreadable,
        left_out=len(names) - len(people),
    )


def _latest(rows: list[ScoredClip]) -> list[ScoredClip]:
    """Each clip once: the row of a try that went well before that of one that failed."""
    kept: dict[str, ScoredClip] = {}
    for row in rows:
        if row.clip_id not in kept or kept[row.clip_id].error is not None:
            kept[row.clip_id] = row
    return list(kept.values())


def _one_each(rows: list[MetricRow]) -> list[MetricRow]:
    """Each (identity, method, prompt, seed) once, in the order of seeds."""
    kept: dict[tuple[str, str, str, int], MetricRow] = {}
    for row in rows:
        if row.method == "validation":  # shown beside the curves, not compared with held-out clips
            continue
        key = (row.identity_id, row.method, row.prompt, row.seed)
        if key not in kept or kept[key].error is not None:
            kept[key] = row
    return sorted(kept.values(), key=lambda row: (row.identity_id, row.seed, row.prompt))


def _of_person(identity: Identity, own: list[ScoredClip], shared: list[ScoredClip]) -> list[ScoredClip]:
    own = [clip for clip in own if clip.error is None and clip.kind in REWARDED]
    prompts = {clip.prompt for clip in own}
    shared = [clip for clip in shared if clip.kind == BASE_CLIP and clip.error is None]
    # V_s are made once for each class word: this person's are those under the prompts of its own clips.
    shared = [clip for clip in shared if clip.prompt in prompts] or shared
    return with_identity_reward(own + shared, identity.references) if identity.references else own + shared


def _log(attempt: Callable[..., Any], run: Run, name: str) -> LogRows:
    rows = attempt(lambda: storage.read_table(run.path(name)), []) if run.has(name) else []
    return sorted((row for row in rows if row.get("step") is not None), key=lambda row: float(row["step"]))


def _validation(run: Run, identity_id: str) -> tuple[list[tuple[int, str]], int]:
    """Validation clips by step (`step-000060.mp4`), and how many are kept as latents only."""
    folder = training_uri(identity_id, "hpo", "validation")
    names = {file.rsplit("/", 1)[-1] for file in storage.list_files(run.path(folder))}
    clips = {name.removesuffix(".mp4") for name in names if name.endswith(".mp4")}
    latents = {name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")}
    numbered = [(int("".join(c for c in name if c.isdigit()) or 0), f"{folder}/{name}.mp4") for name in clips]
    return sorted(numbered), len(latents - clips)


def _modified(run: Run, name: str) -> datetime | None:
    fs, path = storage.open_fs(run.path(name))
    try:
        when = fs.modified(path)
    except (OSError, NotImplementedError):
        return None
    return when.astimezone(UTC) if isinstance(when, datetime) else None
