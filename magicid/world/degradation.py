"""What a small generator does to pictures: softening, noise, flicker, JPEG blocks and shifts of colour.

Every reward and metric network is trained on clean renders and on degraded ones, so that it works on generated clips.
A clip is degraded as one picture of 3 F channels: its frames share the blur and the colour shift, and only noise and
flicker differ from frame to frame.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def fold_frames(clips_BFHWC: Bytes) -> Bytes:
    """(B, F, H, W, 3) to (B, H, W, 3 F)."""
    batch, frames, height, width, channels = clips_BFHWC.shape
    return np.ascontiguousarray(clips_BFHWC.transpose(0, 2, 3, 1, 4)).reshape(batch, height, width, frames * channels)


def unfold_frames(folded: Bytes) -> Bytes:
    """(B, H, W, 3 F) to (B, F, H, W, 3)."""
    batch, height, width, channels = folded.shape
    return np.ascontiguousarray(folded.reshape(batch, height, width, channels // 3, 3).transpose(0, 3, 1, 2, 4))


def _soften(image: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    height, width = image.shape[:2]
    kind = rng.integers(3)
    if kind == 0:
        return cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.1)) * height / 48)
    if kind == 1:  # detail lost in a latent of fewer pixels
        factor = float(rng.uniform(1.3, 2.2))
        small = cv2.resize(image, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_LINEAR)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    blurred = cv2.GaussianBlur(image, (0, 0), height / 48)
    return image + float(rng.uniform(0.2, 0.8)) * (image - blurred)  # over-sharpened


def _colour(image: NDArray[np.float32], rng: np.random.Generator, amount: float) -> NDArray[np.float32]:
    frames = image.shape[2] // 3
    gain = np.tile(rng.normal(1, 0.06 * amount, 3) * rng.normal(1, 0.08 * amount), frames)
    offset = np.tile(rng.normal(0, 6 * amount, 3) + rng.normal(0, 8 * amount), frames)
    flicker = np.repeat(rng.normal(0, 2 * amount, frames), 3) * (rng.random() < 0.5)
    return image * gain.astype(np.float32) + (offset + flicker).astype(np.float32)


def _noise(image: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    noise: NDArray[Any] = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 9))
    if rng.random() < 0.5:  # blotches rather than grain
        noise = 2 * cv2.GaussianBlur(noise, (0, 0), 0.8)
    return image + noise


def degrade(images_BHWC: Bytes, rng: np.random.Generator, *, amount: float = 1.0) -> Bytes:
    """Degrade pictures or folded clips, each in its own way.

    Args:
        images_BHWC: (B, H, W, 3 F) uint8 RGB, see `fold_frames`.
        rng: source of every choice.
        amount: 0 leaves the pictures alone; at 1 about a fifth of them stays clean.

    Returns:
        A new array of the same shape and type.
    """
    out = np.empty_like(images_BHWC)
    for index, source in enumerate(images_BHWC):
        image: NDArray[Any] = source.astype(np.float32)
        if rng.random() < 0.8 * amount:
            image = _colour(image, rng, min(1.0, amount))
        if rng.random() < 0.5 * amount:
            image = _soften(image, rng)
        if rng.random() < 0.5 * amount:
            image = _noise(image, rng)
        result = np.clip(np.rint(image), 0, 255).astype(np.uint8)
        if result.shape[2] == 3 and rng.random() < 0.2 * amount:
            _, data = cv2.imencode(".jpg", result, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 96))])
            result = cv2.imdecode(data, cv2.IMREAD_COLOR)
        out[index] = result
    return out
