"""The scored clips that preferences are made of, adapter by adapter: what a run keeps in its folders, in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magicid import schema
from magicid.laboratory.clips import Bank, Sampler, encoded_again, still_copy, wanted
from magicid.laboratory.measuring import Measuring
from magicid.laboratory.people import CLASS_WORD, Person
from magicid.laboratory.population import Stack
from magicid.prompts import for_class
from magicid.recipe import Recipe
from magicid.schema import ScoredClip
from magicid.selection import with_identity_reward

Say = Callable[[str], None]
TRAINED_SEED = 500_000  # of V_t, beyond the seed of V_s: far from those of held-out clips


@dataclass(frozen=True)
class Owner:
    """Whose adapter it is: the person, the training seed, and the learning rate of the self-reconstruction."""

    person: Person
    seed: int
    rate: float


class Start(NamedTuple):
    """Where preference training begins: the SFT's moving copies of each photo, whether captions are used, its steps."""

    moving: int
    captions: bool
    steps: int

    @property
    def method(self) -> str:
        """The SFT, as the tables name it."""
        return "sft" + "_moving" * bool(self.moving) + "_captions" * self.captions


@dataclass(frozen=True)
class Repository:
    """Scored clips of one adapter: V_s, its V_t and V_id; and V_still and V_mov, which nobody scores."""

    owner: Owner
    clips: list[ScoredClip]


class Repositories:
    """Makes the repository of each adapter; V_s is made once for all.

    Args:
        prompts: of the training split, with the class word in them.
        references: name -> unit embeddings (P, D) of the person's photos, by the reward's recogniser.
        owners: whose adapters a stack holds, in its order.
        say: told how far it is.
    """

    def __init__(
        self,
        recipe: Recipe,
        sampler: Sampler,
        bank: Bank,
        measuring: Measuring,
        prompts: Sequence[str],
        references: Mapping[str, NDArray[np.float32]],
        owners: Sequence[Owner],
        say: Say,
    ) -> None:
        self.recipe, self.sampler, self.bank, self.measuring = recipe, sampler, bank, measuring
        self.prompts, self.references, self.owners, self._say = prompts, references, owners, say
        self._base_clips: list[ScoredClip] | None = None

    def make(self, start: Start, trained: Stack, static: Sequence[Tensor]) -> list[Repository]:
        """V_s, V_t, V_id, V_still and V_mov of each adapter.

        Args:
            start: how the adapters came to be.
            trained: the adapters.
            static: latents (P, C, F, H, W) of each owner's photos held still.
        """
        settings = self.recipe.repository
        if self._base_clips is None:
            prompts = [self.prompts[i % len(self.prompts)] for i in range(settings.base_clips)]
            seeds = [settings.seed + i for i in range(settings.base_clips)]
            clips = wanted(schema.BASE_CLIP, None, prompts, seeds)
            self._base_clips = self._scored(clips, self.sampler.sample(None, prompts, seeds))
        prompts = [self.prompts[i % len(self.prompts)] for i in range(settings.trained_clips)]
        seeds = [settings.seed + TRAINED_SEED + i for i in range(settings.trained_clips)]
        sampled = self.sampler.sample(trained, prompts, seeds).unflatten(0, (len(self.owners), -1))
        clips, latents = [], []
        for k, owner in enumerate(self.owners):
            training, photos = self._training(start, owner), len(static[k])
            captions = captions_of(self.recipe, owner.person, photos, start.captions)
            clips += wanted(schema.TRAINED_CLIP, owner.person.name, prompts, seeds, training=training)
            clips += wanted(schema.STATIC_CLIP, owner.person.name, captions, [0] * photos, training=training)
            latents += [sampled[k], static[k]]
        scored = self._scored(clips, torch.cat(latents))
        self._say(f"repository after {start.steps} steps: {len(scored)} clips")
        found, position = [], 0
        for k, owner in enumerate(self.owners):
            count = len(prompts) + len(static[k])
            mine = [*self._base_clips, *scored[position : position + count]]
            mine = with_identity_reward(mine, self.references[owner.person.name])
            copies = [still_copy(clip) for clip in mine if clip.kind == schema.TRAINED_CLIP]
            found.append(Repository(owner, [*mine, *copies, *self._moving_copies(start, owner)]))
            position += count
        return found

    @staticmethod
    def _training(start: Start, owner: Owner) -> str:
        """Tells the adapters of one person apart."""
        return f"{start.method}-{start.moving}-{start.steps}/{owner.seed}/{owner.rate:g}"

    def _moving_copies(self, start: Start, owner: Owner) -> list[ScoredClip]:
        """V_mov of one adapter's person, their latents kept; nobody scores them."""
        photos = len(owner.person.photos)
        captions = captions_of(self.recipe, owner.person, photos * (1 + start.moving), start.captions)[photos:]
        training, seeds = self._training(start, owner), [0] * len(captions)
        clips = wanted(schema.MOVING_CLIP, owner.person.name, captions, seeds, training=training)
        if clips:
            self.bank.add([clip.clip_id for clip in clips], self.sampler.moving(owner.person.photos, start.moving))
        return clips

    def _scored(self, clips: Sequence[ScoredClip], latents: Tensor) -> list[ScoredClip]:
        """Scored clips, their latents kept; of V_t also those of V_still, and those of V_t encoded again."""
        frames = self.sampler.decode(latents)
        trained = [i for i, clip in enumerate(clips) if clip.kind == schema.TRAINED_CLIP]
        for start in range(0, len(trained), 60):
            part = trained[start : start + 60]
            still, encode = np.repeat(frames[part, :1], frames.shape[1], axis=1), self.sampler.backbone.encode_video
            self.bank.add([still_copy(clips[i]).clip_id for i in part], encode(still))
            self.bank.add([encoded_again(clips[i].clip_id) for i in part], encode(frames[part]))
        return self.bank.score(self.measuring, clips, latents, frames)


def captions_of(recipe: Recipe, person: Person, clips: int, captions: bool) -> list[str]:
    """Of a person's photos, and after them of their moving copies, which show nobody who stands still."""
    plain = for_class(recipe.sft.prompt, CLASS_WORD)
    still = list(person.captions) if captions else [plain] * len(person.photos)
    return still + [plain] * (clips - len(still))
