"""What the base model can make: a checked body becomes a VideoRequest in which nothing is left open, or a 400."""

from __future__ import annotations

import secrets
from typing import NoReturn

from magicid.errors import RecipeError
from magicid.recipe import Recipe
from serve.api_errors import ApiError
from serve.api_models import CreateVideo
from serve.schema import VideoRequest
from serve.settings import ServeSettings

_MIN_FRAMES, _FRAME_STEP = 5, 4  # latents hold 4 frames each after the first
_PATCH_PX = 16
_NAMED = 20  # as many allowed values are listed in an error; more are described
_SEEDS = 2**32


class Limits:
    """The recipe's sampling as defaults and upper bounds. Raises RecipeError: no length is allowed."""

    def __init__(self, recipe: Recipe, settings: ServeSettings) -> None:
        self._sampling, self._kind = recipe.sampling, recipe.backbone.kind
        self._max_steps = max(settings.max_steps, recipe.sampling.steps)
        self._frames = range(_MIN_FRAMES, (settings.max_frames or recipe.sampling.frames) + 1, _FRAME_STEP)
        if not self._frames:
            raise RecipeError(f"endpoint setting max_frames: {settings.max_frames}", f"use {_MIN_FRAMES} or more")

    def request(self, body: CreateVideo) -> VideoRequest:
        """The whole request. Raises ApiError (400) naming the field and what is allowed."""
        ours = self._sampling
        fps = body.fps or ours.fps
        frames = self._length(body, fps)
        height, width = self._size(body.size)
        steps = body.num_inference_steps or ours.steps
        if steps > self._max_steps:
            _refuse("num_inference_steps", f"is at most {self._max_steps}")
        guidance = ours.guidance_scale if body.guidance_scale is None else body.guidance_scale
        if body.negative_prompt and not self._uses_negative(guidance):
            _refuse("negative_prompt", "has no effect: this base model runs without classifier-free guidance")
        return VideoRequest(
            prompt=body.prompt,
            frames=frames,
            height=height,
            width=width,
            fps=fps,
            steps=steps,
            guidance_scale=guidance,
            seed=secrets.randbelow(_SEEDS) if body.seed is None else body.seed,
            negative_prompt=body.negative_prompt or None,
            lora_scale=body.lora.scale if body.lora else 1.0,
        )

    def _length(self, body: CreateVideo, fps: int) -> int:
        """Frames from `num_frames` or `seconds`; a length that the model cannot make is refused, never rounded."""
        if body.num_frames is not None and body.num_frames not in self._frames:
            _refuse("num_frames", f"must be {_one_of([str(n) for n in self._frames])}")
        if body.seconds is None:
            return body.num_frames or min(self._sampling.frames, self._frames[-1])
        lengths = {f"{frames / fps:g}": frames for frames in self._frames}
        frames = lengths.get(_spelled(body.seconds))
        if frames is None:
            _refuse("seconds", f"must be {_one_of(list(lengths))} at {fps} fps")
        if body.num_frames not in (None, frames):
            _refuse("num_frames", f"and seconds differ: {body.seconds} s at {fps} fps are {frames} frames")
        return frames

    def _size(self, size: str | None) -> tuple[int, int]:
        """Height and width in px."""
        most = self._sampling
        if size is None:
            return most.height, most.width
        width, height = (int(side) for side in size.split("x"))
        fits = height * width <= most.height * most.width
        if not fits or not height or not width or height % _PATCH_PX or width % _PATCH_PX:
            _refuse(
                "size",
                f"must be WIDTHxHEIGHT in multiples of {_PATCH_PX} px and no larger in area than "
                f"{most.width}x{most.height}",
            )
        return height, width

    def _uses_negative(self, guidance: float) -> bool:
        if self._kind == "wan":  # there `guidance_scale` is the classifier-free one
            return guidance > 1
        return self._sampling.true_cfg_scale > 1


def _spelled(seconds: str) -> str:
    """A number as the lengths are spelled; anything else as it is, which is none of them."""
    try:
        return f"{float(seconds):g}"
    except ValueError:
        return seconds


def _one_of(values: list[str]) -> str:
    if len(values) > _NAMED:
        return f"one of {', '.join(values[:3])}, ... {values[-1]}"
    return f"one of {', '.join(values)}" if len(values) > 1 else values[0]


def _refuse(field: str, message: str) -> NoReturn:
    raise ApiError(400, "invalid_value", f"{field} {message}", param=field)
