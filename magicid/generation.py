"""Making the clips of a run: sample (or encode a photo), write mp4 + latents + text embeddings, return the rows.

Outputs are content-addressed, so a finished clip is found, never made twice. A clip that fails is tried again; after
`repository.attempts` tries within one job its row carries the reason. A try is written down before it begins, so a clip
that kills the process is given up as well.
"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from magicid import storage, storage_errors
from magicid.attempts import Attempts
from magicid.backbones import load_backbone
from magicid.backbones.base import TextEmbeddings
from magicid.clips import decode_mp4, encode_mp4, inflate_photo, pan_photo
from magicid.errors import GenerationError, MagicIDError, StorageError
from magicid.recipe import Recipe
from magicid.run import Run, caption_uri, clip_uri, text_uri
from magicid.schema import MOVING_CLIP, STATIC_CLIP, STILL_CLIP, VALIDATION_CLIP, Clip
from magicid.training.tokens import TOKENS, with_tokens

_log = logging.getLogger(__name__)


class Generator:
    """Holds the whole video model and makes clips.

    Args:
        job: name of this start of the job; tries are counted per job, so an interruption costs no clip its tries.
        device: torch device.
    """

    def __init__(self, recipe: Recipe, run: Run, *, job: str, device: str = "cpu") -> None:
        self.recipe, self.run = recipe, run
        self.attempts = Attempts(run, job, recipe.repository.attempts)
        self.backbone = load_backbone(recipe, parts=("transformer", "vae", "text"), device=device)
        self._adapter: str | None = None
        self._tokens: torch.Tensor | None = None  # of an adapter that is extended tokens and no LoRA
        self._texts: dict[str, str] = {}  # prompt -> URI of its embeddings, once written

    def make(self, wanted: Sequence[Clip]) -> Iterator[Clip]:
        """One row for each wanted clip, in order. One clip's failure, of whatever kind, does not end the others.

        Raises:
            StorageError: the run's storage is full or away, which is no clip's failure.
        """
        for clip in wanted:
            yield self._finished(clip) or self._try(clip)

    def _finished(self, clip: Clip) -> Clip | None:
        """The row of a clip whose files are there and whole; None otherwise. The mp4 is written last."""
        video_uri, latents_uri = files(clip)
        try:
            if not storage.exists(self.run.path(video_uri)):
                return None
            video = storage.read_bytes(self.run.path(video_uri))
            decode_mp4(video)
            storage.read_arrays(self.run.path(latents_uri))
            return dataclasses.replace(
                clip,
                video_uri=video_uri,
                video_sha256=storage.sha256_bytes(video),
                latents_uri=latents_uri,
                latents_sha256=storage.sha256_bytes(storage.read_bytes(self.run.path(latents_uri))),
                text_uri=self._text(clip),
            )
        except Exception as error:
            if isinstance(error, StorageError) and storage_errors.outage(error):
                raise  # it may well be whole
            _log.warning("clip %s is made again: %s", clip.clip_id, error)
            return None

    def _try(self, clip: Clip) -> Clip:
        limit, problem = self.recipe.repository.attempts, ""
        for number in range(limit):
            try:
                tries = self.attempts.begin(clip.clip_id)
            except MagicIDError as error:  # earlier tries took their process with them
                if isinstance(error, StorageError) and storage_errors.outage(error):
                    raise
                return dataclasses.replace(clip, attempts=number, error=problem or str(error))
            try:
                return dataclasses.replace(self._make(clip), attempts=tries)
            except Exception as error:
                if isinstance(error, StorageError) and storage_errors.outage(error):
                    raise
                text = str(error) if isinstance(error, MagicIDError) else f"{type(error).__name__}: {error}"
                problem = f"failed {tries} times: {text}"
        return dataclasses.replace(clip, attempts=limit, error=problem)

    def _make(self, clip: Clip) -> Clip:
        latents = self._latents(clip)
        if not torch.isfinite(latents).all():
            raise GenerationError(f"clip {clip.clip_id} has non-finite latents", "check the adapter and the precision")
        frames = self.backbone.decode(latents)[0]
        text = self._text(clip)
        video_uri, latents_uri = files(clip)
        latents_sha256 = storage.write_arrays(
            self.run.path(latents_uri), {"latents": latents[0].to(torch.float32).cpu().numpy()}
        )
        video_sha256 = storage.write_bytes(self.run.path(video_uri), encode_mp4(frames, self.recipe.sampling.fps))
        return dataclasses.replace(
            clip,
            video_uri=video_uri,
            video_sha256=video_sha256,
            latents_uri=latents_uri,
            latents_sha256=latents_sha256,
            text_uri=text,
        )

    def _latents(self, clip: Clip) -> torch.Tensor:
        """Latents (1, C, F, H, W): sampled, encoded from a photo or a frame, or what a trainer left."""
        if clip.kind in (STATIC_CLIP, MOVING_CLIP):
            return self._photo_latents(clip)
        if clip.kind == STILL_CLIP:
            frames, _ = decode_mp4(storage.read_bytes(self.run.path(clip_uri(str(clip.source_id), ".mp4"))))
            return self.backbone.encode_video(np.repeat(frames[:1], len(frames), axis=0)[None])
        if clip.kind == VALIDATION_CLIP:
            return torch.from_numpy(storage.read_arrays(self.run.path(str(clip.latents_uri)))["latents"])[None]
        self._use_adapter(clip)
        if self._tokens is None:
            return self.backbone.sample([clip.prompt], [clip.seed])
        text = with_tokens(self.backbone.encode_prompts([clip.prompt]), self._tokens)
        return self.backbone.sample_text(text, [clip.seed])

    def _photo_latents(self, clip: Clip) -> torch.Tensor:
        sampling = self.recipe.sampling
        data = storage.read_bytes(self.run.path(str(clip.photo_uri)))
        photo = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        size = (sampling.frames, sampling.height, sampling.width)
        frames = pan_photo(photo, *size, clip.seed) if clip.kind == MOVING_CLIP else inflate_photo(photo, *size)
        return self.backbone.encode_video(frames[None])

    def _use_adapter(self, clip: Clip) -> None:
        if clip.adapter_sha256 == self._adapter:
            return
        state = None
        if clip.adapter_uri is not None:
            arrays = storage.read_arrays(self.run.path(clip.adapter_uri))
            state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._tokens = state.pop(TOKENS, None) if state else None
        self.backbone.load_adapter(state or None)
        self._adapter = clip.adapter_sha256

    def _text(self, clip: Clip) -> str:
        """Write the prompt's text embeddings once, for training; returns their URI.

        Those of a photo are the clip's own: its caption may say something of the person, and goes when the clip goes.
        """
        if clip.kind == STATIC_CLIP:
            return self._written(caption_uri(clip.clip_id), clip.prompt)
        if clip.prompt not in self._texts:
            backbone = self.recipe.backbone
            settings = [self.backbone.base_sha256, backbone.prompt_template, backbone.max_sequence_length]
            self._texts[clip.prompt] = self._written(text_uri(clip.prompt, storage.sha256_json(settings)), clip.prompt)
        return self._texts[clip.prompt]

    def _written(self, uri: str, prompt: str) -> str:
        if not storage.exists(self.run.path(uri)):
            storage.write_arrays(self.run.path(uri), _arrays(self.backbone.encode_prompts([prompt])))
        return uri


def files(clip: Clip) -> tuple[str, str]:
    """(mp4, latents) of a clip, relative to the run; a validation clip's mp4 lies beside its latents."""
    if clip.kind == VALIDATION_CLIP:
        latents = str(clip.latents_uri)
        return latents.removesuffix(".safetensors") + ".mp4", latents
    return clip_uri(clip.clip_id, ".mp4"), clip_uri(clip.clip_id, ".safetensors")


def _arrays(text: TextEmbeddings) -> dict[str, np.ndarray]:
    """Text embeddings as arrays that every reader has: bfloat16 is widened."""
    return {n: (t.float() if t.is_floating_point() else t).cpu().numpy() for n, t in text.items()}
