"""Rendered pictures with the true boxes and landmarks of the faces in them: for the detector and the recognisers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicid.world.backdrops import draw_backdrops
from magicid.world.drawing import Painter
from magicid.world.face import draw_people, face_boxes, face_landmarks
from magicid.world.language import ACTIONS, PLACES
from magicid.world.motion_paths import SCALE, photo_poses
from magicid.world.motion_paths import X as POSE_X
from magicid.world.people import looks
from magicid.world.renderer import render_clips, render_scene, sample_people

PHOTO_SIZE = 96
FRAME_SIZE = 48
_CHUNK = 48


@dataclass(frozen=True)
class Stills:
    """Pictures (N, S, S, 3) uint8 RGB of one person each, boxes (N, 4) and landmarks (N, 5, 2) in px, people (N,)."""

    images: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    people: NDArray[np.int64]

    def faces(self) -> NDArray[np.float32]:
        """(N, 1, 7, 2): two corners of the box and five landmarks."""
        return np.concatenate([self.boxes.reshape(-1, 2, 2), self.landmarks], 1)[:, None]


@dataclass(frozen=True)
class FaceImages:
    """Frames of clips (48 px) and photos (96 px) of the same people."""

    frames: Stills
    photos: Stills


def _paint(
    people: NDArray[np.float32], poses: NDArray[np.float32], backdrops: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Draw people (N, P) in poses (N, K) on backdrops (N, S, S, 3): pictures, boxes (N, 4), landmarks (N, 5, 2)."""
    size = backdrops.shape[1]
    painter = Painter(backdrops)
    person = looks(people)
    maps = draw_people(painter, person, poses, size)
    pictures = painter.pictures().transpose(0, 2, 3, 1)
    return pictures, face_boxes(person, poses, maps, size), face_landmarks(person, maps)


def _lit(pictures: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    count = len(pictures)
    light = rng.uniform(0.86, 1.06, (count, 1, 1, 1)) * (1 + rng.uniform(-0.05, 0.05, (count, 1, 1, 3)))
    return np.clip(pictures * light.astype(np.float32) + 0.5, 0, 255).astype(np.uint8)


def photo_stills(people: NDArray[np.float32], each: int, seed: int, size: int = PHOTO_SIZE) -> Stills:
    """``each`` photos of every one of people (N, P), posed as `renderer.render_photos` poses them, with their truth."""
    rng = np.random.default_rng([seed, 1])
    index = np.repeat(np.arange(len(people)), each)
    images, boxes, landmarks = [], [], []
    for start in range(0, len(index), _CHUNK):
        rows = index[start : start + _CHUNK]
        places = rng.integers(0, len(PLACES), len(rows))
        backdrops = draw_backdrops(places, rng.integers(0, 2**31, len(rows)), size)
        pictures, box, points = _paint(people[rows], photo_poses(len(rows), rng)[:, 0], backdrops)
        images.append(_lit(pictures, rng))
        boxes.append(box)
        landmarks.append(points)
    return Stills(np.concatenate(images), np.concatenate(boxes), np.concatenate(landmarks), index)


def frame_stills(people: NDArray[np.float32], clips: int, frames_per_clip: int, seed: int) -> Stills:
    """Frames of ``clips`` clips of every one of people (N, P), each clip with its own action, place and seed."""
    rng = np.random.default_rng([seed, 2])
    index = np.repeat(np.arange(len(people)), clips)
    images, boxes, landmarks = [], [], []
    for start in range(0, len(index), _CHUNK):
        rows = index[start : start + _CHUNK]
        actions, places = (rng.integers(0, n, len(rows)) for n in (len(ACTIONS), len(PLACES)))
        rendered = render_clips(people[rows], actions, places, rng.integers(0, 2**31, len(rows)))
        times = rng.permuted(np.tile(np.arange(rendered.frames.shape[1]), (len(rows), 1)), axis=1)[:, :frames_per_clip]
        lines = np.arange(len(rows))[:, None]
        images.append(rendered.frames[lines, times].reshape(-1, *rendered.frames.shape[2:]))
        boxes.append(rendered.boxes[lines, times].reshape(-1, 4))
        landmarks.append(rendered.landmarks[lines, times].reshape(-1, 5, 2))
    who = np.repeat(index, frames_per_clip)
    return Stills(np.concatenate(images), np.concatenate(boxes), np.concatenate(landmarks), who)


def face_images(people: int, seed: int, *, clips: int, frames_per_clip: int, photos: int) -> FaceImages:
    """Pictures of ``people`` random people; the same seed gives the same people and pictures."""
    who = sample_people(people, seed)
    return FaceImages(frame_stills(who, clips, frames_per_clip, seed), photo_stills(who, photos, seed))


@dataclass(frozen=True)
class FacePictures:
    """Pictures with one face, two faces and none, by kind: lists of pictures and of their faces (M, 7, 2)."""

    kinds: dict[str, tuple[list[NDArray[np.uint8]], list[NDArray[np.float32]]]]

    def groups(self) -> Iterator[tuple[str, list[NDArray[np.uint8]], list[NDArray[np.float32]]]]:
        """(kind, pictures, faces) one after the other."""
        for kind, (images, faces) in self.kinds.items():
            yield kind, images, faces

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """A random picture and its faces; kinds are equally likely but frames come twice as often."""
        names = list(self.kinds)
        weights = np.array([2.0 if name == "one_face" else 1.0 for name in names])
        images, faces = self.kinds[names[rng.choice(len(names), p=weights / weights.sum())]]
        row = int(rng.integers(len(images)))
        return images[row], faces[row]

    def draw_backdrop(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        """A random picture without anybody."""
        images = self.kinds["no_face"][0]
        return images[int(rng.integers(len(images)))]


def _crowd(
    pair: NDArray[np.float32], size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Two people (2, P) side by side, as `renderer.render_crowd` draws them, with their faces (2, 7, 2)."""
    picture = draw_backdrops(rng.integers(0, len(PLACES), 1), rng.integers(0, 2**31, 1), size)
    poses = photo_poses(2, rng)[:, 0]
    faces = []
    for i in range(2):
        poses[i, POSE_X] = (i + 0.5) / 2 + rng.uniform(-0.04, 0.04)
        poses[i, SCALE] *= rng.uniform(0.65, 0.8)
        picture, box, points = _paint(pair[i : i + 1], poses[i : i + 1], picture)
        faces.append(np.concatenate([box.reshape(2, 2), points[0]]))
    return _lit(picture, rng)[0], np.stack(faces).astype(np.float32)


def picture_pool(people: int, seed: int) -> FacePictures:
    """Pictures of ``people`` people: 3 frames and a photo each, half as many crowds of two, as many empty scenes."""
    who = sample_people(people, seed)
    rng = np.random.default_rng([seed, 3])
    frames, photos = frame_stills(who, 1, 3, seed), photo_stills(who, 1, seed)
    crowds = [_crowd(who[[i, -1 - i]], FRAME_SIZE if i % 3 == 0 else PHOTO_SIZE, rng) for i in range(people // 2)]
    scenes: list[NDArray[np.uint8]] = []
    for size in (FRAME_SIZE, PHOTO_SIZE):
        places = np.arange(people // 2) % len(PLACES)
        scenes += list(render_scene(places, rng.integers(0, 2**31, len(places)), size))
    nobody = [np.zeros((0, 7, 2), dtype=np.float32)] * len(scenes)
    return FacePictures(
        {
            "one_face": (list(frames.images), list(frames.faces())),
            "one_face_photos": (list(photos.images), list(photos.faces())),
            "two_faces": ([c[0] for c in crowds], [c[1] for c in crowds]),
            "no_face": (scenes, nobody),
        }
    )
