"""Shares of GPUs and CPUs."""

from __future__ import annotations

from magicid import recipe
from ray_jobs.pools import with_shared_gpus


def test_a_laptop_recipe_takes_the_gpu_that_is_there() -> None:
    plain = recipe.load("face-world")
    assert with_shared_gpus(plain, 0) is plain
    shared = with_shared_gpus(plain, 1).resources
    assert (shared.generator.gpus, shared.semantics.gpus, shared.worker_gpus) == (0.2, 0.2, 0.5)  # 5 actors, 2 slots
    assert with_shared_gpus(plain, 8).resources.worker_gpus == 1.0


def test_a_cluster_recipe_keeps_its_own_shares() -> None:
    own = recipe.load("hunyuan-480p")
    assert with_shared_gpus(own, 8) is own


def test_the_face_world_leaves_cpus_to_the_read_tasks_of_two_cores() -> None:
    resources = recipe.load("face-world").resources
    assert resources.pool_cpus() < 1.5
    assert resources.slots * resources.workers_per_slot * resources.worker_cpus < 1.5
