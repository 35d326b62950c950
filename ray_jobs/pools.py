"""Sizes and shares of the Ray Data actor pools.

One task in flight per actor: with minute-long rows a deeper queue leaves one actor idle while another has two rows, and
a lost node loses two. CPUs are a recipe value because they are bookkeeping: on a laptop four pools share two cores.
"""

from __future__ import annotations

from typing import Any

from ray.data import ActorPoolStrategy, DataContext, Dataset

from magicid.recipe import Pool, Recipe
from ray_jobs.stages import Stage

POOLS = ("generator", "identity", "motion", "semantics")  # sections of the recipe's resources
NO_PROGRESS_TIMEOUT_S = 6 * 3600  # a cold 26 GB load or a wait for spot machines is not a hang


def configure() -> None:
    """Settings of Ray Data for long rows on machines that may vanish; the job draws its own progress."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    context.max_errored_blocks = 0  # stages turn failures into rows; anything else is a defect and must be seen
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S


def add_stage(dataset: Dataset, stage: type[Stage], pool: Pool, arguments: dict[str, Any], batch_size: int) -> Dataset:
    """Append a stage, run by an actor pool, to a dataset of Arrow rows."""
    return dataset.map_batches(
        stage,
        fn_constructor_kwargs=arguments,
        compute=ActorPoolStrategy(
            min_size=pool.min_size, max_size=max(pool.min_size, pool.max_size), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        batch_size=batch_size,
        batch_format="pyarrow",
    )


def with_shared_gpus(recipe: Recipe, gpus: float) -> Recipe:
    """The recipe with a share of a GPU for every actor, where the cluster has GPUs and the recipe asks for none.

    Ray hides GPUs from whoever asks for none, so a laptop's recipe would not use a card that is there. The pools of one
    pass, or the slots, fit `gpus` cards together; shares limit no memory.
    """
    resources = recipe.resources
    pools = {name: getattr(resources, name) for name in POOLS}
    if gpus <= 0 or resources.worker_gpus or any(pool.gpus for pool in pools.values()):
        return recipe
    actors = sum(max(pool.min_size, pool.max_size) for pool in pools.values())
    shares: dict[str, float] = {f"resources.{name}.gpus": _share(gpus, actors) for name in POOLS}
    shares["resources.worker_gpus"] = _share(gpus, resources.slots * resources.workers_per_slot)
    return recipe.with_overrides(shares)


def _share(gpus: float, actors: int) -> float:
    """At most one GPU each, rounded down."""
    return min(1.0, int(gpus / actors * 1000) / 1000)
