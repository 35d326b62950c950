"""Steps of one identity that need neither a model nor the driver: they read and write the run, as Ray tasks.

They are small for one identity and too much for one process when there are thousands, so the driver only awaits them.
No module of this file loads torch: a worker that runs them is ready in a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import ray

from magicid import adapters, storage
from magicid.errors import SelectionError
from magicid.evaluation import table
from magicid.recipe import Recipe
from magicid.repository import AdapterRef
from magicid.rewards.rows import reward_rows
from magicid.run import Run
from magicid.schema import REWARDED, MetricRow, Pair, Rejected, RewardRow, ScoredClip
from magicid.selection import select_pairs, with_identity_reward
from ray_jobs.pipeline import best

T = TypeVar("T")
CPUS = 0.1  # a share beside the pools; two cores must hold all of them


@dataclass(frozen=True)
class Chosen:
    """The pairs of an identity, as far as the driver needs to know them."""

    counts: Counter[str]  # P_id, P_dy, P_still
    prompt: str  # of the first pair


def choose_pairs(run: str, recipe: Recipe, identity_id: str, clip_ids: list[str]) -> Chosen:
    """The pairs of one identity into `pairs/`, with the reasons for what was dropped.

    Args:
        recipe: the identity's own.
        clip_ids: its clips and V_s; their rows lie in the run.

    Raises:
        SelectionError: no pair could be made.
        StorageError: rows cannot be read or written.
    """
    where, name = Run(run), f"pairs/{identity_id}.parquet"
    pairs = where.read(name, Pair) if where.has(name) else []
    if not pairs:
        rows = best(
            [row for part in ("_shared", identity_id) for row in where.read_parts(f"scored/{part}", ScoredClip)]
        )
        scored = with_identity_reward([rows[clip_id] for clip_id in clip_ids], where.identity(identity_id).references)
        selected = select_pairs(identity_id, scored, recipe.selection)
        rewarded = [clip for clip in scored if clip.kind in REWARDED]
        where.write(f"rewards/{identity_id}.parquet", reward_rows(rewarded, selected, recipe.rewards), RewardRow)
        where.write(f"pairs/{identity_id}.rejected.parquet", selected.dropped, Rejected)
        where.write(name, selected.pairs, Pair)
        pairs = selected.pairs
    if not pairs:
        raise SelectionError("no preference pair could be made", f"see pairs/{identity_id}.rejected.parquet")
    return Chosen(Counter(pair.kind for pair in pairs), pairs[0].prompt)


def publish(
    run: str, recipe: Recipe, base_sha256: str, identity_id: str, sft: AdapterRef, hpo: AdapterRef, measured: list[str]
) -> str:
    """Publish one identity's adapter, with a manifest that says what it was made from; returns the version.

    Args:
        recipe: the identity's own.
        measured: ids of the clips its metrics are taken from.
    """
    where = Run(run)
    name = f"pairs/{identity_id}.parquet"
    person = where.identity(identity_id)
    pairs = where.read(name, Pair) if recipe.hpo.steps and where.has(name) else []
    rows = where.read_parts(f"evaluation/{identity_id}", MetricRow, without=("video_features",))
    metrics = {row.clip_id: row for row in sorted(rows, key=lambda row: row.error is None)}  # the good ones last
    manifest = adapters.AdapterManifest(
        owner=person.owner,
        consent=person.consent or "",
        base_sha256=base_sha256,
        recipe_sha256=recipe.content_sha256,
        rank=recipe.lora.rank,
        alpha=recipe.lora.alpha,
        pairs_sha256=storage.sha256_json([pair.pair_id for pair in pairs]),
        reference_sha256=sft.sha256,
        metrics=table.summary(
            [metrics[clip] for clip in measured if clip in metrics], identity_id, "hpo" if pairs else "sft"
        ),
    )
    return adapters.publish(run, identity_id, storage.read_bytes(where.path(hpo.uri)), manifest).version


def file_sha256(location: str) -> str:
    """Hash of a file. Raises StorageError."""
    return storage.sha256_bytes(storage.read_bytes(location))


class Tasks(Protocol):
    """Runs the functions above somewhere."""

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result, or what it raised."""


class RayTasks:
    """Runs them as Ray tasks."""

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result, or what it raised."""
        try:
            return await ray.remote(function).options(num_cpus=CPUS).remote(*arguments)  # type: ignore[no-any-return]
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from None
