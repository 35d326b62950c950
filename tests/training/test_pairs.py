"""The order of pairs and draws: pure functions of (seed, step)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from magicid.errors import StorageError, TrainingError
from magicid.schema import Pair
from magicid.storage import write_arrays
from magicid.training.pairs import PairOrder, PairStore, Visit, draw, draw_number, rank_slice


def kinds(static: int, dynamic: int) -> dict[str, str]:
    return {f"id{i}": "P_id" for i in range(static)} | {f"dy{i}": "P_dy" for i in range(dynamic)}


def visits(order: PairOrder, steps: int) -> list[Visit]:
    return [visit for step in range(steps) for visit in order.batch(step)]


def test_batches_are_a_function_of_seed_and_step() -> None:
    order = PairOrder(kinds(5, 7), 3, 0.5, seed=4)
    forward = [order.batch(step) for step in range(20)]
    backward = [PairOrder(kinds(5, 7), 3, 0.5, seed=4).batch(step) for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [PairOrder(kinds(5, 7), 3, 0.5, seed=5).batch(step) for step in range(20)]


def test_each_pair_is_visited_once_per_round() -> None:
    seen = visits(PairOrder(kinds(4, 8), 3, 1.0, seed=0), 12)  # 36 visits: three rounds of 12 pairs
    assert Counter(visit.pair_id for visit in seen) == dict.fromkeys(kinds(4, 8), 3)
    assert len(set(seen)) == 36  # and the visits of each are numbered 0, 1, 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_static_share_is_never_exceeded_and_nearly_met(batch_size: int, share: float) -> None:
    order = PairOrder(kinds(30, 10), batch_size, share, seed=1)
    static = 0
    for step in range(60):
        batch = order.batch(step)
        assert len(batch) == batch_size
        static += sum(visit.pair_id.startswith("id") for visit in batch)
        total = (step + 1) * batch_size
        limit = min(share, 0.75) * total
        assert limit - 1 < static <= limit + 1e-9


def test_one_kind_alone_is_used_whatever_the_share() -> None:
    assert all(v.pair_id.startswith("id") for v in visits(PairOrder(kinds(3, 0), 2, 0.2, seed=0), 5))
    assert all(v.pair_id.startswith("dy") for v in visits(PairOrder(kinds(0, 3), 2, 1.0, seed=0), 5))


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no pairs"):
        PairOrder({}, 1, 0.5, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_take_disjoint_equally_long_slices(size: int, world_size: int) -> None:
    batch = [Visit(f"p{i}", 0) for i in range(size)]
    slices = [rank_slice(batch, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in slices}) == 1
    weighted = [visit.pair_id for part in slices for visit, weight in part if weight == 1.0]
    assert sorted(weighted) == sorted(visit.pair_id for visit in batch)


def test_draws_are_pure_and_distinct() -> None:
    first, same = (draw(3, "pair", 1, (2, 3, 4, 4), 7.0) for _ in range(2))
    assert torch.equal(first.noise, same.noise)
    assert torch.equal(first.sigma, same.sigma)
    for other in (draw(4, "pair", 1, (2, 3, 4, 4), 7.0), draw(3, "pair", 2, (2, 3, 4, 4), 7.0)):
        assert not torch.equal(first.noise, other.noise)
        assert float(first.sigma) != float(other.sigma)


def test_draws_follow_the_shifted_logit_normal() -> None:
    sigmas = torch.stack([draw(0, f"p{i}", 0, (1, 1, 1, 1), 3.0).sigma for i in range(2000)])
    assert float(sigmas.min()) > 0
    assert float(sigmas.max()) < 1
    assert float(sigmas.median()) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.03)  # the shifted middle


def test_draws_cycle_or_are_fresh() -> None:
    assert [draw_number(visit, 3) for visit in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [draw_number(visit, 0) for visit in range(4)] == [0, 1, 2, 3]


def make_pair(number: int) -> Pair:
    return Pair(
        pair_id=f"p{number}",
        identity_id="anna",
        kind="P_dy",
        rank=number,
        prompt="a person nods",
        text_uri="text/a.safetensors",
        winner_id="w",
        winner_kind="V_t",
        winner_latents_uri=f"latents/w{number}.safetensors",
        winner_rewards=[0.5, 1.0, 5.0],
        loser_id="l",
        loser_kind="V_s",
        loser_latents_uri="latents/l.safetensors",
        loser_rewards=[0.1, 0.5, 4.0],
    )


def test_pairs_are_read_from_a_run_and_few_are_kept(tmp_path: Path) -> None:
    run = str(tmp_path)
    write_arrays(f"{run}/text/a.safetensors", {"prompt_embeds": np.ones((1, 3, 4), np.float32)})
    write_arrays(f"{run}/latents/l.safetensors", {"latents": np.full((2, 1, 4, 4), 2, np.float16)})
    for number in range(3):
        write_arrays(f"{run}/latents/w{number}.safetensors", {"latents": np.full((2, 1, 4, 4), number, np.float32)})
    store = PairStore([make_pair(number) for number in range(3)], run, keep=2)
    assert store.kinds == {"p0": "P_dy", "p1": "P_dy", "p2": "P_dy"}
    for number in (0, 1, 2, 0):
        pair = store[f"p{number}"]
        assert pair.winner.unique().tolist() == [number]
        assert pair.loser.unique().tolist() == [2.0]
        assert pair.loser.dtype == torch.float32
        assert pair.text["prompt_embeds"].shape == (1, 3, 4)
    assert store["p2"] is store["p2"]


def test_sides_of_other_shapes_and_missing_files_are_errors(tmp_path: Path) -> None:
    run = str(tmp_path)
    write_arrays(f"{run}/text/a.safetensors", {"prompt_embeds": np.ones((1, 3, 4), np.float32)})
    write_arrays(f"{run}/latents/l.safetensors", {"latents": np.zeros((2, 1, 4, 4), np.float32)})
    write_arrays(f"{run}/latents/w0.safetensors", {"latents": np.zeros((2, 2, 4, 4), np.float32)})
    store = PairStore([make_pair(0), make_pair(1)], run)
    with pytest.raises(TrainingError, match="pair p0"):
        store["p0"]
    with pytest.raises(StorageError, match="w1"):
        store["p1"]
