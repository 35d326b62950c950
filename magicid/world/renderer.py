"""Renders people of the face world in clips and photos, with exact optical flow and exact labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magicid.world.backdrops import draw_backdrops
from magicid.world.drawing import Floats, Painter, layer_flow
from magicid.world.face import LAYERS, draw_people, face_boxes, face_landmarks, head_frame
from magicid.world.language import ACTIONS, PLACES, STILL
from magicid.world.motion_paths import POSE, SCALE, clip_poses, photo_poses
from magicid.world.motion_paths import X as POSE_X
from magicid.world.motion_paths import Y as POSE_Y
from magicid.world.people import PARAMETERS, looks, sample_people

__all__ = [
    "PARAMETERS", "POSE", "RenderedClips", "photo_places", "render_clips", "render_crowd", "render_photos",
    "render_scene", "sample_people",
]  # fmt: skip

FRAMES, SIZE, FPS = 13, 48, 8
_PHOTOS = 505  # of the seeds of photos: others than those of clips
_CHUNK = 8  # small enough for the working set to stay in the cache


@dataclass
class RenderedClips:
    """Rendered clips and their truth.

    Attributes:
        frames: uint8 RGB (B, F, H, W, 3).
        flow: float32 (B, F-1, H, W, 2), px as (x, y), from frame t to t+1, of the topmost card at each pixel of t.
        flow_valid: bool (B, F-1, H, W), the target is in the frame and not occluded at t+1.
        pose: float32 (B, F, K), columns as in ``POSE``; x and y in px.
        boxes: float32 (B, F, 4), x1, y1, x2, y2 px around the face without hair.
        landmarks: float32 (B, F, 5, 2) px: left eye, right eye, nose, left, right mouth corner (left in the picture).
        actions: int64 (B,), indices into ``ACTIONS`` (-1: nothing is done).
        places: int64 (B,), indices into ``PLACES``.
    """

    frames: NDArray[np.uint8]
    flow: NDArray[np.float32]
    flow_valid: NDArray[np.bool_]
    pose: NDArray[np.float32]
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    actions: NDArray[np.int64]
    places: NDArray[np.int64]


def _indices(values: ArrayLike, name: str, low: int, high: int, count: int | None) -> NDArray[np.int64]:
    out = np.asarray(values, np.int64).reshape(-1)
    if count is not None and len(out) != count:
        raise ValueError(f"{name} has {len(out)} entries, expected {count}")
    if len(out) and (out.min() < low or out.max() >= high):
        raise ValueError(f"{name} must be in {low}..{high - 1}")
    return out


def _people(values: ArrayLike) -> NDArray[np.float32]:
    out = np.atleast_2d(np.asarray(values, np.float32))
    if out.ndim != 2 or out.shape[1] != len(PARAMETERS):
        raise ValueError(f"people must be (B, {len(PARAMETERS)}), got {out.shape}")
    if not (np.isfinite(out).all() and (out >= 0).all() and (out <= 1).all()):
        raise ValueError("identity parameters must be in 0..1")
    return out


def _to_bytes(pictures: Floats) -> NDArray[np.uint8]:
    return np.clip(pictures + np.float32(0.5), 0, 255).astype(np.uint8)


def _render_chunk(
    people: NDArray[np.float32], poses: NDArray[np.float32], backdrops: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32], tuple[NDArray[np.float32], ...]]:
    """Pictures (B, F, 3, H, W), layers (B, F, H, W), card maps (B, F, L, 2, 3) and (pose in px, boxes, landmarks)."""
    batch, frames, _ = poses.shape
    size = backdrops.shape[1]
    person = looks(people).repeat(frames)
    pose = poses.reshape(batch * frames, -1)
    painter = Painter(np.repeat(backdrops, frames, axis=0))
    maps = draw_people(painter, person, pose, size)
    true_pose = pose.copy()
    true_pose[:, POSE_X], true_pose[:, POSE_Y], _ = head_frame(pose, size)
    truth = (true_pose, face_boxes(person, pose, maps, size), face_landmarks(person, maps))
    lead = (batch, frames)
    return (
        painter.pictures().reshape(*lead, 3, size, size),
        painter.layers().reshape(*lead, size, size),
        maps.reshape(*lead, len(LAYERS), 2, 3),
        tuple(part.reshape(*lead, *part.shape[1:]) for part in truth),
    )


def render_clips(
    people: ArrayLike,
    actions: ArrayLike,
    places: ArrayLike,
    seeds: ArrayLike,
    *,
    frames: int = FRAMES,
    size: int = SIZE,
) -> RenderedClips:
    """Render clips of people who do ``actions`` in ``places``.

    Args:
        people: identity parameters (B, P) in 0..1, columns as in ``PARAMETERS``.
        actions: indices (B,) into ``ACTIONS``, -1 for a person who does nothing.
        places: indices (B,) into ``PLACES``.
        seeds: integers (B,) that decide everything else: speed, phase, start, backdrop details, light.
        frames: number of frames F, normally 4k+1, at 8 fps.
        size: height and width in px.

    Raises:
        ValueError: lengths differ or a value is out of its range.
    """
    who = _people(people)
    batch = len(who)
    does = _indices(actions, "actions", STILL, len(ACTIONS), batch)
    where = _indices(places, "places", 0, len(PLACES), batch)
    seed = _indices(seeds, "seeds", 0, 2**62, batch)
    shape = (batch, frames, size, size)
    out = RenderedClips(
        frames=np.empty((*shape, 3), np.uint8),
        flow=np.empty((batch, max(frames - 1, 0), size, size, 2), np.float32),
        flow_valid=np.empty((batch, max(frames - 1, 0), size, size), bool),
        pose=np.empty((batch, frames, len(POSE)), np.float32),
        boxes=np.empty((batch, frames, 4), np.float32),
        landmarks=np.empty((batch, frames, 5, 2), np.float32),
        actions=does,
        places=where,
    )
    for start in range(0, batch, _CHUNK):
        part = slice(start, start + _CHUNK)
        poses = clip_poses(does[part], seed[part], frames)
        backdrops = draw_backdrops(where[part], seed[part], size)
        pictures, layers, maps, truth = _render_chunk(who[part], poses, backdrops)
        light = np.array([np.random.default_rng([int(s), 404]).uniform(0.94, 1.04) for s in seed[part]], np.float32)
        out.frames[part] = _to_bytes(pictures * light[:, None, None, None, None]).transpose(0, 1, 3, 4, 2)
        out.pose[part], out.boxes[part], out.landmarks[part] = truth
        out.flow[part], out.flow_valid[part] = layer_flow(layers, maps)
    return out


def render_photos(person: ArrayLike, n: int, seed: int, *, size: int = 96) -> NDArray[np.uint8]:
    """``n`` photos uint8 RGB (n, size, size, 3) of one person (P,): near frontal, varied in pose, place and light.

    The head takes the same part of the picture as in clips.
    """
    rng = np.random.default_rng([seed, _PHOTOS])
    who = np.repeat(_people(person), n, axis=0)
    places = _photo_places(n, rng)
    backdrops = draw_backdrops(places, rng.integers(0, 2**31, n), size)
    pictures, _, _, _ = _render_chunk(who, photo_poses(n, rng), backdrops)
    light = rng.uniform(0.86, 1.06, (n, 1, 1, 1, 1)) * (1 + rng.uniform(-0.05, 0.05, (n, 1, 3, 1, 1)))
    return np.ascontiguousarray(_to_bytes(pictures * light)[:, 0].transpose(0, 2, 3, 1))


def photo_places(n: int, seed: int) -> NDArray[np.int64]:
    """Where `render_photos` takes its ``n`` photos: indices into ``PLACES``."""
    return _photo_places(n, np.random.default_rng([seed, _PHOTOS]))


def _photo_places(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Places of consecutive photos: different ones, as long as there are some."""
    return (rng.permutation(len(PLACES))[np.arange(n) % len(PLACES)]).astype(np.int64)


def render_scene(places: ArrayLike, seeds: ArrayLike, size: int = SIZE) -> NDArray[np.uint8]:
    """Backdrops uint8 RGB (B, size, size, 3) without anybody."""
    where = _indices(places, "places", 0, len(PLACES), None)
    return _to_bytes(draw_backdrops(where, _indices(seeds, "seeds", 0, 2**62, len(where)), size))


def render_crowd(people: ArrayLike, place: int, seed: int, *, size: int = 96) -> NDArray[np.uint8]:
    """One picture uint8 RGB (size, size, 3) with all of ``people`` (M, P) side by side, M >= 1."""
    who = _people(people)
    count = len(who)
    rng = np.random.default_rng([seed, 606])
    picture = draw_backdrops(np.array([place]), np.array([seed]), size)
    poses = photo_poses(count, rng)
    for i in range(count):
        poses[i, 0, POSE_X] = (i + 0.5) / count + rng.uniform(-0.02, 0.02)
        poses[i, 0, SCALE] *= min(1.0, 1.5 / count)
        picture = _render_chunk(who[i : i + 1], poses[i : i + 1], picture)[0][:, 0].transpose(0, 2, 3, 1)
    return _to_bytes(picture)[0]
