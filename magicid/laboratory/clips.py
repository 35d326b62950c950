"""Clips of the laboratory: sampled by the trainer's backbone, kept in memory, rewarded like those of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magicid import repository, schema
from magicid.backbones.base import TextEmbeddings
from magicid.clips import inflate_photo, pan_photo
from magicid.laboratory.measuring import Measuring
from magicid.laboratory.population import Stack, StackedLora
from magicid.rewards.dynamics import MotionReward
from magicid.schema import ScoredClip
from magicid.training.tokens import TOKENS, with_tokens

_ROWS = {"cpu": 16, "cuda": 480}  # clips in one forward pass


class TextBank:
    """Embeddings of prompts, each computed once, on the device."""

    def __init__(self, backbone: Any, device: torch.device) -> None:
        self._backbone, self._device = backbone, device
        self._known: dict[str, TextEmbeddings] = {}

    def __call__(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Embeddings of B prompts."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                made = self._backbone.encode_prompts([prompt])
                self._known[prompt] = {name: tensor.to(self._device) for name, tensor in made.items()}
        return {name: torch.cat([self._known[prompt][name] for prompt in prompts]) for name in self._known[prompts[0]]}


class Sampler:
    """Samples from the base or from many adapters, which may be extended tokens instead of LoRAs."""

    def __init__(self, backbone: Any, adapters: StackedLora, text: TextBank, device: torch.device) -> None:
        self.backbone, self.adapters, self.text, self.device = backbone, adapters, text, device

    @contextmanager
    def under(self, weights: Stack | None, text: TextEmbeddings) -> Iterator[TextEmbeddings]:
        """What K adapters make of the text of K row groups; LoRAs are active inside the block."""
        if weights is None or TOKENS not in weights:
            with self.adapters.active(weights):
                yield text
            return
        each = len(next(iter(text.values()))) // len(weights[TOKENS])
        groups = [{name: rows[k * each :][:each] for name, rows in text.items()} for k in range(len(weights[TOKENS]))]
        told = [with_tokens(group, tokens) for group, tokens in zip(groups, weights[TOKENS])]
        yield {name: torch.cat([group[name] for group in told]) for name in text}

    @torch.no_grad()
    def sample(
        self, weights: Stack | None, prompts: Sequence[str], seeds: Sequence[int], *, frames: int | None = None
    ) -> Tensor:
        """Latents float32 (K * P, C, F, H, W): every adapter with the same P prompts and seeds, adapter by adapter.

        Args:
            weights: the adapters; None samples the base once.
            frames: another length than the recipe's, 4k+1.
        """
        count = 1 if weights is None else len(next(iter(weights.values())))
        each = max(1, _ROWS[self.device.type] // len(prompts))
        backbone = self.backbone if frames is None else self.backbone.with_sampling(frames=frames)
        made = []
        for start in range(0, count, each):
            part = None if weights is None else {k: w.detach()[start : start + each] for k, w in weights.items()}
            repeats = min(each, count - start)
            with self.under(part, self.text(list(prompts) * repeats)) as text:
                made.append(backbone.sample_text(text, list(seeds) * repeats))
        return torch.cat(made)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """uint8 RGB clips (N, F, H, W, 3)."""
        rows = _ROWS[self.device.type]
        return np.concatenate([self.backbone.decode(latents[i : i + rows]) for i in range(0, len(latents), rows)])

    def static(self, photos: NDArray[np.uint8]) -> Tensor:
        """V_id: latents (P, C, F, H, W) of photos inflated to clips."""
        s = self.backbone.recipe.sampling
        inflated = np.stack([inflate_photo(photo, s.frames, s.height, s.width) for photo in photos])
        latents: Tensor = self.backbone.encode_video(inflated)
        return latents

    def moving(self, photos: NDArray[np.uint8], copies: int) -> Tensor:
        """V_mov: latents (P * copies, C, F, H, W) of photos that are panned and turned, as a run makes them."""
        s = self.backbone.recipe.sampling
        panned = [
            pan_photo(photo, s.frames, s.height, s.width, repository.moving_seed(place, number))
            for place, photo in enumerate(photos)
            for number in range(copies)
        ]
        latents: Tensor = self.backbone.encode_video(np.stack(panned))
        return latents


class Bank:
    """Clips with their rewards and latents; what a run keeps in its folders.

    Args:
        motion: the motion reward, on the device that samples.
        fps: of the clips.
    """

    def __init__(self, motion: MotionReward, fps: float) -> None:
        self._motion, self._fps = motion, fps
        self._latents: list[Tensor] = []
        self._rows: dict[str, int] = {}

    def index(self, clip_ids: Sequence[str]) -> Tensor:
        """Rows of clips in `latents`."""
        return torch.tensor([self._rows[name] for name in clip_ids])

    @property
    def latents(self) -> Tensor:
        """(N, C, F, H, W) of all clips."""
        if len(self._latents) > 1:
            self._latents = [torch.cat(self._latents)]
        return self._latents[0]

    def add(self, ids: Sequence[str], latents: Tensor) -> None:
        """Keep latents under their clips' ids."""
        for name in ids:
            assert name not in self._rows, f"{name} is there already"
            self._rows[name] = len(self._rows)
        self._latents.append(latents)

    def score(
        self,
        measuring: Measuring,
        clips: Sequence[ScoredClip],
        latents: Tensor,
        frames: NDArray[np.uint8],
    ) -> list[ScoredClip]:
        """The clips with raw rewards and embeddings; R_id is still to be taken against a person."""
        futures = measuring.rewards(frames, [clip.prompt for clip in clips], self._fps)
        motions = self._motion.score_many(frames)
        rewarded = [one for future in futures for one in future.result()]
        self.add([clip.clip_id for clip in clips], latents)
        return [
            dataclasses.replace(
                clip,
                embeddings=[None if np.isnan(row).any() else row.tolist() for row in found.embeddings],
                motion_reward=motion,
                semantics_reward=found.semantics,
            )
            for clip, found, motion in zip(clips, rewarded, motions)
        ]


def wanted(
    kind: str, owner: str | None, prompts: Sequence[str], seeds: Sequence[int], *, training: str = ""
) -> list[ScoredClip]:
    """Clips to be made; `training` tells the adapters of one person apart."""
    return [
        ScoredClip(
            clip_id=f"{kind}/{owner or 'base'}/{training}/{number}",
            kind=kind,
            identity_id=owner,
            method={schema.BASE_CLIP: "base", schema.STATIC_CLIP: "photo"}.get(kind, "sft"),
            prompt_id="",
            prompt=prompt,
            seed=seed,
            latents_uri="memory",
        )
        for number, (prompt, seed) in enumerate(zip(prompts, seeds))
    ]


def still_copy(clip: ScoredClip) -> ScoredClip:
    """The V_still of a V_t clip."""
    return ScoredClip(
        clip_id=f"{clip.clip_id}/still",
        kind=schema.STILL_CLIP,
        identity_id=clip.identity_id,
        method="still",
        prompt_id="",
        prompt=clip.prompt,
        seed=clip.seed,
        latents_uri="memory",
        source_id=clip.clip_id,
    )


def encoded_again(clip_id: str) -> str:
    """Under which id the latents of a V_t clip lie that was decoded and encoded again, as its V_still was."""
    return f"{clip_id}/again"
