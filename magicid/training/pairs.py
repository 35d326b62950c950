"""Preference pairs as tensors, and the seeded order in which training visits them.

A pair is a type with two named sides; no code relies on even and odd positions of a batch. Which pairs a step trains
on, and with which noise, are pure functions of (seed, step): the same after a restart and for any number of workers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from magicid.backbones.base import TextEmbeddings, shifted_sigma
from magicid.errors import TrainingError
from magicid.schema import Pair
from magicid.storage import join, read_arrays, sha256_json

STATIC_PAIR = "P_id"


@dataclass(frozen=True)
class PairTensors:
    """One pair, loaded. `winner` and `loser` are float32 latents (C, F, H, W); `text` has batch dimension 1."""

    pair_id: str
    kind: str
    winner: Tensor
    loser: Tensor
    text: TextEmbeddings


@dataclass(frozen=True)
class Draw:
    """One (noise level, noise) draw, shared by winner and loser: sigma () in 0..1, noise (C, F, H, W), float32."""

    sigma: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Visit:
    """One visit of a pair in training; `number` counts the visits of this pair from 0."""

    pair_id: str
    number: int


def read_latents(run: str, uri: str) -> Tensor:
    """The latents (C, F, H, W) of a clip, float32. Raises StorageError."""
    return torch.from_numpy(read_arrays(join(run, uri))["latents"]).float()


def read_text(run: str, uri: str) -> TextEmbeddings:
    """Text embeddings of one prompt, each with batch dimension 1. Raises StorageError."""
    return {name: torch.from_numpy(array) for name, array in read_arrays(join(run, uri)).items()}


@dataclass
class PairStore:
    """The pairs of one identity, loaded from a run directory when first used; the last `keep` stay in memory."""

    pairs: Sequence[Pair]
    run: str
    keep: int = 64
    _by_id: dict[str, Pair] = field(init=False)
    _cache: OrderedDict[str, PairTensors] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._by_id = {pair.pair_id: pair for pair in self.pairs}

    @property
    def kinds(self) -> dict[str, str]:
        """Pair id -> kind, in the order of selection."""
        return {pair_id: pair.kind for pair_id, pair in self._by_id.items()}

    @property
    def sha256(self) -> str:
        """Hash of which pairs there are; a resumed run must find the same."""
        return sha256_json(self.kinds)

    def __getitem__(self, pair_id: str) -> PairTensors:
        """One pair. Raises StorageError (unreadable) or TrainingError (the sides do not fit each other)."""
        if pair_id in self._cache:
            self._cache.move_to_end(pair_id)
            return self._cache[pair_id]
        pair = self._by_id[pair_id]
        loaded = PairTensors(
            pair_id,
            pair.kind,
            read_latents(self.run, pair.winner_latents_uri),
            read_latents(self.run, pair.loser_latents_uri),
            read_text(self.run, pair.text_uri),
        )
        if loaded.winner.shape != loaded.loser.shape:
            raise TrainingError(
                f"pair {pair_id}: winner latents {tuple(loaded.winner.shape)} and loser latents "
                f"{tuple(loaded.loser.shape)} differ in shape",
                "generate the repository again with one sampling size",
            )
        self._cache[pair_id] = loaded
        while len(self._cache) > self.keep:
            self._cache.popitem(last=False)
        return loaded


@dataclass(frozen=True)
class PairOrder:
    """Which pairs each step trains on.

    P_id and P_dy are each visited in seeded permutations, one after the other, so that no pair has a second visit
    before all of its kind had the first. P_id gets its natural share of all visits but at most `static_share`, counted
    over all steps so far (a batch of one pair alternates); where there is one kind only, it gets every visit.
    """

    kinds: dict[str, str]
    batch_size: int
    static_share: float
    seed: int

    def __post_init__(self) -> None:
        if not self.kinds:
            raise TrainingError("there are no pairs to train on", "look at the selection's reasons for dropped clips")

    def _split(self) -> tuple[list[str], list[str], Fraction]:
        static = [pair_id for pair_id, kind in self.kinds.items() if kind == STATIC_PAIR]
        dynamic = [pair_id for pair_id, kind in self.kinds.items() if kind != STATIC_PAIR]
        share = Fraction(len(static), len(self.kinds))
        if static and dynamic:
            share = min(share, Fraction(str(self.static_share)))
        return static, dynamic, share

    def batch(self, step: int) -> list[Visit]:
        """The global batch of a step (from 0), the same for any number of workers."""
        static, dynamic, share = self._split()
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        static_first, static_last = int(share * first), int(share * last)  # floor: never above the share
        visits = [self._visit(static, "static", i) for i in range(static_first, static_last)]
        visits += [self._visit(dynamic, "dynamic", i) for i in range(first - static_first, last - static_last)]
        return visits

    def _visit(self, pair_ids: list[str], stream: str, index: int) -> Visit:
        epoch, position = divmod(index, len(pair_ids))
        order = torch.randperm(len(pair_ids), generator=generator(self.seed, stream, epoch))
        return Visit(pair_ids[int(order[position])], epoch)


def rank_slice(visits: Sequence[Visit], rank: int, world_size: int) -> list[tuple[Visit, float]]:
    """The share of one worker with weights: disjoint over workers, equally long on all.

    Where the batch does not divide, the last ones are repeats of weight 0: under ZeRO-3 every worker must run as many
    forward passes as the others.
    """
    per_rank = -(-len(visits) // world_size)
    positions = range(rank, per_rank * world_size, world_size)
    return [(visits[i % len(visits)], 1.0 if i < len(visits) else 0.0) for i in positions]


def generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(seed: int, key: str, number: int, shape: Sequence[int], shift: float) -> Draw:
    """Noise level and noise number `number` of a pair or clip `key`: a pure function of its arguments.

    Args:
        shape: of the latents, (C, F, H, W).
        shift: timestep shift of `shifted_sigma`.
    """
    random = generator(seed, "draw", key, number)
    uniform = torch.rand((), generator=random, dtype=torch.float64)
    return Draw(shifted_sigma(uniform, shift).float(), torch.randn(tuple(shape), generator=random))


def draw_number(visit_number: int, noise_draws: int) -> int:
    """Which draw a visit uses: the fixed ones in turn, or a fresh one at each visit when `noise_draws` is 0."""
    return visit_number % noise_draws if noise_draws else visit_number
