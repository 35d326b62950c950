"""64 people of the face world: photos, a short SFT each, published; and the metric encoder, which says who is seen."""

from __future__ import annotations

import numpy as np
from PIL import Image

from magicid import adapters, recipe
from magicid.adapters import AdapterManifest, AdapterRef
from magicid.backbones import load_backbone
from magicid.clips import inflate_photo
from magicid.rewards.identity import IdentityReward, identity_reward
from magicid.training.engine import create_engine
from magicid.training.sft import train_sft
from magicid.weights import resolve
from magicid.world.renderer import render_photos, sample_people

COUNT, PHOTOS, SFT_STEPS = 64, 4, 40
NAMES = [f"sitter-{number:02d}" for number in range(COUNT)]
_FIRST_SEED = 9_200_000  # no network has seen people of seeds of 9 000 000 and more


def photos(number: int) -> np.ndarray:
    """Photos uint8 (PHOTOS, 96, 96, 3) of a person."""
    seed = _FIRST_SEED + number
    return render_photos(sample_people(1, seed)[0], PHOTOS, seed)


def train(run: str) -> dict[str, AdapterRef]:
    """An adapter of everybody after SFT_STEPS steps of SFT on inflated photos, published for the tenant `team`."""
    settings = recipe.load("face-world", {"sft.steps": SFT_STEPS})
    backbone = load_backbone(settings, device="cpu")
    text = backbone.encode_prompts(["a person"])
    sides = (settings.sampling.frames, settings.sampling.height, settings.sampling.width)
    latents = {
        name: {
            str(place): backbone.encode_video(np.asarray(inflate_photo(photo, *sides))[None])[0]
            for place, photo in enumerate(photos(number))
        }
        for number, name in enumerate(NAMES)
    }
    engine = create_engine(
        backbone.transformer, backbone.lora_target_modules(), settings.lora, settings.trainer, kind="torch"
    )
    refs = {}
    for name, clips in latents.items():
        result = train_sft(engine, backbone, clips, dict.fromkeys(clips, text), settings.sft, settings.trainer)
        weights = adapters.to_bytes(
            backbone.lora_state_dict(result.lora_state), settings.lora.rank, settings.lora.alpha
        )
        manifest = AdapterManifest(
            backbone.base_sha256, settings.content_sha256, settings.lora.rank, settings.lora.alpha, owner="team"
        )
        refs[name] = adapters.publish(run, name, weights, manifest)
    return refs


class Witness:
    """Who is seen in a clip, by the metric encoder: not the one that anything was trained with."""

    def __init__(self) -> None:
        self._reader = IdentityReward.from_pretrained(resolve("world:identity_metric"), detection_size=128)
        self._references = [self._references_of(number) for number in range(COUNT)]

    def _references_of(self, number: int) -> np.ndarray:
        return np.stack(
            [self._reader.detect(np.asarray(Image.fromarray(photo)))[0].embedding for photo in photos(number)]
        )

    def likeness(self, frames: np.ndarray) -> np.ndarray | None:
        """Mean cosine (COUNT,) of a clip with everybody's photos; None where no face is found."""
        embeddings = self._reader.embed(frames)
        scores = [identity_reward(embeddings, references) for references in self._references]
        return None if None in scores else np.asarray(scores, dtype=float)
