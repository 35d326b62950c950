"""Sizes and shares of the Ray Data actor pools.

One task in flight per actor: with minute-long rows a deeper queue leaves one actor idle while another has two rows, and
a lost node loses two. CPUs are a recipe value because they are bookkeeping: on a laptop four pools share two cores.
"""

from __future__ import annotations

from typing import Any

from ray.data import ActorPoolStrategy, DataContext, Dataset

from magicid.recipe import Pool, Recipe

POOLS = ("generator", "identity", "motion", "semantics")  # sections of the recipe's resources
NO_PROGRESS_TIMEOUT_S = 10 * 365 * 86400  # an idle source, or a wait for spot machines, is not a hang


def configure() -> None:
    """Settings of Ray Data for long rows on machines that may vanish; the job draws its own progress."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    context.actor_pool_util_upscaling_threshold = 1.0  # with one task in flight it never gets higher
    context.max_errored_blocks = 0  # stages turn failures into rows; anything else is a defect and must be seen
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S


def add_source(dataset: Dataset, source: type, arguments: dict[str, Any]) -> Dataset:
    """Append the one actor that waits for work; it takes no share of a machine."""
    return dataset.map_batches(
        source,
        fn_constructor_kwargs=arguments,
        compute=ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=1),
        num_cpus=0,
        batch_size=1,
        batch_format="pyarrow",
    )


def add_stage(dataset: Dataset, stage: type, pool: Pool, arguments: dict[str, Any]) -> Dataset:
    """Append a stage, run by an actor pool, to a dataset of Arrow blocks.

    Blocks are passed on whole: with a batch size Ray Data would wait for more rows to fill a batch.
    """
    return dataset.map_batches(
        stage,
        fn_constructor_kwargs=arguments,
        compute=ActorPoolStrategy(
            min_size=pool.min_size, max_size=max(pool.min_size, pool.max_size), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        batch_size=None,
        batch_format="pyarrow",
    )


def together(recipe: Recipe, cluster: dict[str, float]) -> bool:
    """Whether the pools at their smallest and one training slot fit the cluster at the same time.

    Where they do not, as on one GPU, each gives its share back as soon as it has nothing to do, and they take turns.
    """
    resources = recipe.resources
    pools = [getattr(resources, name) for name in POOLS] + ([resources.identity] if recipe.evaluation.identity else [])
    slot = resources.workers_per_slot
    gpus = sum(pool.min_size * pool.gpus for pool in pools) + slot * resources.worker_gpus
    cpus = sum(pool.min_size * pool.cpus for pool in pools) + slot * resources.worker_cpus
    return gpus <= cluster.get("GPU", 0.0) and cpus <= cluster.get("CPU", 0.0)


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
