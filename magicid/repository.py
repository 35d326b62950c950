"""What clips a run wants: the preference repository B = V_t + V_s + V_id, its still copies, and the evaluation clips.

Pure functions from identities, prompts and adapters to clip requests. A clip's id is the hash of everything that
decides its pixels, so the same request in another run, or after a crash, finds the finished clip.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from magicid import schema
from magicid.prompts import for_class
from magicid.recipe import Recipe
from magicid.schema import Clip, Identity, Prompt
from magicid.storage import sha256_json


@dataclass(frozen=True)
class AdapterRef:
    """An adapter file in the published form; `uri` is relative to the run."""

    uri: str
    sha256: str


def base_clips(recipe: Recipe, base_sha256: str, prompts: Sequence[Prompt], class_word: str) -> list[Clip]:
    """V_s: clips of the untouched base, made once per run and class word and shared by all identities."""
    return _sampled(
        recipe, base_sha256, schema.BASE_CLIP, "base", prompts, class_word, recipe.repository.base_clips, None, None,
        recipe.repository.seed,
    )  # fmt: skip


def trained_clips(
    recipe: Recipe, base_sha256: str, prompts: Sequence[Prompt], identity: Identity, adapter: AdapterRef
) -> list[Clip]:
    """V_t: clips of the identity's SFT adapter."""
    return _sampled(
        recipe, base_sha256, schema.TRAINED_CLIP, "sft", prompts, identity.class_word, recipe.repository.trained_clips,
        identity.identity_id, adapter, recipe.repository.seed,
    )  # fmt: skip


def evaluation_clips(
    recipe: Recipe,
    base_sha256: str,
    prompts: Sequence[Prompt],
    class_word: str,
    method: str,
    identity: Identity | None,
    adapter: AdapterRef | None,
    step: int = 0,
    kind: str = schema.EVALUATION_CLIP,
) -> list[Clip]:
    """Held-out clips of one method: the same (prompt, seed) list for every method and identity.

    `step` is how many training steps are behind the adapter; one on its way makes clips of the kind CURVE_CLIP.
    """
    return _sampled(
        recipe, base_sha256, kind, method, prompts, class_word, recipe.evaluation.clips,
        identity.identity_id if identity else None, adapter, recipe.evaluation.seed, step,
    )  # fmt: skip


def static_clips(recipe: Recipe, base_sha256: str, identity: Identity) -> list[Clip]:
    """V_id: each reference photo inflated to a clip, under its own caption if the manifest has one, else the SFT's."""
    captions = identity.captions if recipe.sft.captions else []
    clips = []
    for photo_uri, caption in itertools.zip_longest(identity.photos, captions, fillvalue=""):
        prompt = for_class(caption or recipe.sft.prompt, identity.class_word)
        key = ["photo", identity.identity_id, photo_uri, prompt, base_sha256, _pixels(recipe)]
        clips.append(
            Clip(
                clip_id=sha256_json(key)[:32],
                kind=schema.STATIC_CLIP,
                identity_id=identity.identity_id,
                method="photo",
                prompt_id="",
                prompt=prompt,
                seed=0,
                photo_uri=photo_uri,
            )
        )
    return clips


def moving_clips(recipe: Recipe, base_sha256: str, identity: Identity) -> list[Clip]:
    """V_mov: `sft.moving` copies of each photo that move as a whole. Beyond the paper.

    All are under `sft.prompt`: a photo's own caption says what a person does who stands still, and these do not.
    """
    prompt = for_class(recipe.sft.prompt, identity.class_word)
    return [
        replace(
            clip,
            clip_id=sha256_json(["moving", clip.clip_id, prompt, number])[:32],
            kind=schema.MOVING_CLIP,
            prompt=prompt,
            seed=moving_seed(place, number),
        )
        for place, clip in enumerate(static_clips(recipe, base_sha256, identity))
        for number in range(recipe.sft.moving)
    ]


def moving_seed(photo: int, copy: int) -> int:
    """Seed of the path that a copy of a photo takes."""
    return 1000 * photo + copy


def still_clips(clips: Sequence[Clip]) -> list[Clip]:
    """The first frame of each of these V_t clips, held still; they must be made by then. Beyond the paper."""
    return [
        Clip(
            clip_id=sha256_json(["still", clip.clip_id])[:32],
            kind=schema.STILL_CLIP,
            identity_id=clip.identity_id,
            method="still",
            prompt_id=clip.prompt_id,
            prompt=clip.prompt,
            seed=clip.seed,
            source_id=clip.clip_id,
        )
        for clip in clips
    ]


def validation_clips(identity: Identity, latents: Sequence[str], prompt: str) -> list[Clip]:
    """What a trainer sampled on its way; `latents` are relative locations, `.../step-000060.safetensors`."""
    return [
        Clip(
            clip_id=sha256_json(["validation", uri])[:32],
            kind=schema.VALIDATION_CLIP,
            identity_id=identity.identity_id,
            method="validation",
            prompt_id="",
            prompt=prompt,
            seed=int(uri.rsplit("step-", 1)[1].removesuffix(".safetensors")),
            latents_uri=uri,
        )
        for uri in latents
    ]


def _pixels(recipe: Recipe) -> dict[str, int]:
    return {key: getattr(recipe.sampling, key) for key in ("frames", "height", "width", "fps")}


def _sampled(
    recipe: Recipe,
    base_sha256: str,
    kind: str,
    method: str,
    prompts: Sequence[Prompt],
    class_word: str,
    count: int,
    identity_id: str | None,
    adapter: AdapterRef | None,
    first_seed: int,
    step: int = 0,
) -> list[Clip]:
    """`count` clips over the prompts in turn; the seed is the clip's number, so no (prompt, seed) comes twice."""
    settings = {**recipe.sampling.model_dump(mode="json"), **recipe.backbone.model_dump(mode="json", exclude={"path"})}
    clips = []
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        text, seed = for_class(prompt.text, class_word), first_seed + number
        key = ["sampled", base_sha256, adapter.sha256 if adapter else None, text, seed, settings]
        clips.append(
            Clip(
                clip_id=sha256_json(key)[:32],
                kind=kind,
                identity_id=identity_id,
                method=method,
                prompt_id=prompt.prompt_id,
                prompt=text,
                seed=seed,
                adapter_uri=adapter.uri if adapter else None,
                adapter_sha256=adapter.sha256 if adapter else None,
                step=step,
            )
        )
    return clips
