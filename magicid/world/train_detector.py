"""The face detector of the face world: a tiny one-stage network in the output layout of SCRFD.

Layout (insightface, model_zoo/scrfd.py): nine outputs, namely scores, boxes and five key points for the strides 8, 16
and 32, two anchors per place; boxes as distances to the four sides and key points as offsets, in units of the
stride, from the place (column * stride, row * stride). SCRFD itself resizes every picture to 128 x 128.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from insightface.model_zoo import model_zoo
from numpy.typing import NDArray
from torch import Tensor, nn

from magicid.world.degradation import degrade
from magicid.world.face_pool import FacePictures, picture_pool
from magicid.world.training_loop import Ema, autocast, choose_device, train_loop

STRIDES = (8, 16, 32)
# Face sizes (square root of the box area, pixels of the 128 canvas) that each stride answers for; they overlap.
SIZE_RANGES = ((0.0, 36.0), (26.0, 100.0), (74.0, 1e9))
CANVAS = 128
STEPS = 2400


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class FaceDetector(nn.Module):
    """Pictures (B, 3, H, W) scaled as SCRFD does to raw maps (B, 2, 15, H / s, W / s): score, sides, offsets."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 16, 2), _conv(16, 32, 2), _conv(32, width, 2), _conv(width, width))
        self.down16 = nn.Sequential(_conv(width, width, 2), _conv(width, width))
        self.down32 = nn.Sequential(_conv(width, width, 2), _conv(width, width))
        output = nn.Conv2d(width, 2 * 15, 1)
        with torch.no_grad():
            output.get_parameter("bias").view(2, 15)[:, 0] = -4.0  # faces are rare among the places
        self.head = nn.Sequential(_conv(width, width), output)
        self.scales = nn.Parameter(torch.ones(3))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        c8 = self.stem(pictures)
        c16 = self.down16(c8)
        c32 = self.down32(c16)
        p16 = c16 + F.interpolate(c32, scale_factor=2.0, mode="nearest")
        p8 = c8 + F.interpolate(p16, scale_factor=2.0, mode="nearest")
        return [self.head(p).unflatten(1, (2, 15)) for p in (p8, p16, c32)]

    def decode(self, raw: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Raw map to score logits (B, N, 1), sides (B, N, 4) and key points (B, N, 10), N = rows * columns * 2."""
        flat = raw.permute(0, 3, 4, 1, 2).flatten(1, 3)
        scale = self.scales[level]
        return flat[..., :1], F.softplus(flat[..., 1:5]) * scale, flat[..., 5:] * scale


class ScrfdLayout(nn.Module):
    """The detector with its outputs in the order insightface's SCRFD reads them."""

    def __init__(self, detector: FaceDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        levels = [self.detector.decode(raw, i) for i, raw in enumerate(self.detector(pictures))]
        return (*(s.sigmoid() for s, _, _ in levels), *(b for _, b, _ in levels), *(k for _, _, k in levels))


def place_on_canvas(
    image: NDArray[np.uint8], points: NDArray[np.float32], backdrop: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Put a picture on the detection canvas, half the time as SCRFD would, else zoomed, turned and shifted.

    Returns the (128, 128, 3) canvas and the (N, 2) points moved along. Uncovered parts show ``backdrop``.
    """
    size = image.shape[0]
    scale = CANVAS / size
    matrix: NDArray[Any] = np.array([[scale, 0, 0.5 * scale - 0.5], [0, scale, 0.5 * scale - 0.5]])
    if rng.random() < 0.5:
        zoom = scale * float(np.exp(rng.uniform(np.log(0.35), np.log(1.5))))
        angle = float(rng.normal(0, 8))
        matrix = cv2.getRotationMatrix2D((size / 2, size / 2), angle, zoom)
        slack = abs(CANVAS - zoom * size) / 2 + 6
        matrix[:, 2] += CANVAS / 2 - size / 2 + rng.uniform(-slack, slack, 2)
    canvas: NDArray[Any] = cv2.resize(backdrop, (CANVAS, CANVAS), interpolation=cv2.INTER_LINEAR)
    cv2.warpAffine(
        image, matrix, (CANVAS, CANVAS), dst=canvas, flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE if rng.random() < 0.5 else cv2.BORDER_TRANSPARENT,
    )  # fmt: skip
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    return canvas, moved.astype(np.float32)


def training_pictures(
    pool: FacePictures, batch: int, rng: np.random.Generator
) -> tuple[Tensor, list[NDArray[np.float32]]]:
    """A batch of canvases (B, 3, 128, 128) as SCRFD scales them, and per canvas its faces (N, 7, 2): two corners of the
    box (of the turned box, if turned) and five key points, in canvas pixels."""
    canvases = np.empty((batch, CANVAS, CANVAS, 3), dtype=np.uint8)
    faces: list[NDArray[np.float32]] = []
    for i in range(batch):
        image, found = pool.draw(rng)
        if rng.random() < 0.7:
            image = degrade(image[None], rng)[0]
        corners = found[:, :2]
        other = np.stack([corners[:, ::-1, 0], corners[..., 1]], -1)  # the other diagonal
        points = np.concatenate([corners, other, found[:, 2:]], 1)
        canvases[i], moved = place_on_canvas(image, points.reshape(-1, 2), pool.draw_backdrop(rng), rng)
        moved = moved.reshape(-1, 9, 2)
        centre = moved[:, :4].mean(1)
        half = np.abs(moved[:, :4] - centre[:, None]).max(1) * 0.5 + np.abs(moved[:, :4] - centre[:, None]).min(1) * 0.5
        corners = np.stack([centre - half, centre + half], 1)
        inside = ((centre > -4) & (centre < CANVAS + 4)).all(1)
        faces.append(np.concatenate([corners, moved[:, 4:]], 1)[inside])
    pictures = torch.from_numpy(canvases).permute(0, 3, 1, 2).float().sub(127.5).div(128)
    return pictures, faces


def make_targets(faces: list[NDArray[np.float32]], level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B, N) in {1 face, 0 none, -1 do not care}, sides (B, N, 4) and key points (B, N, 10) in strides."""
    stride, (low, high) = STRIDES[level], SIZE_RANGES[level]
    cells = CANVAS // stride
    rows, columns = np.mgrid[:cells, :cells]
    places = np.stack([columns, rows], -1).reshape(-1, 2).astype(np.float32) * stride
    labels = np.zeros((len(faces), len(places)), dtype=np.float32)
    sides = np.zeros((len(faces), len(places), 4), dtype=np.float32)
    points = np.zeros((len(faces), len(places), 10), dtype=np.float32)
    for i, found in enumerate(faces):
        for face in found:
            extent = face[1] - face[0]
            size = float(np.sqrt(extent.prod()))
            offset = np.abs(places - face[:2].mean(0))
            close = (offset <= np.maximum(0.16 * extent, 0.55 * stride)).all(1)
            near = (offset <= np.maximum(0.35 * extent, 0.9 * stride)).all(1)
            visible = face.mean(0)
            if not (low <= size < high) or not ((visible > 2) & (visible < CANVAS - 2)).all():
                margin = 0.8 * low <= size < 1.25 * high
                labels[i, near & (labels[i] == 0)] = -1 if margin else 0
                continue
            labels[i, near & (labels[i] != 1)] = -1
            labels[i, close] = 1
            sides[i, close] = np.concatenate([places - face[0], face[1] - places], 1)[close] / stride
            points[i, close] = ((face[None, 2:] - places[:, None]) / stride).reshape(-1, 10)[close]
    return torch.from_numpy(labels), torch.from_numpy(sides), torch.from_numpy(points)


def detection_loss(model: FaceDetector, pictures: Tensor, faces: list[NDArray[np.float32]]) -> dict[str, Tensor]:
    """Focal loss on the scores; log-scaled L1 on sides and L1 on key points, both relative to the size of the face."""
    device = pictures.device
    with autocast(device):
        maps = model(pictures)
    score_loss = side_loss = point_loss = torch.zeros((), device=device)
    count = torch.zeros((), device=device)
    for level, raw in enumerate(maps):
        score, sides, points = model.decode(raw.float(), level)
        label, target_sides, target_points = (t.to(device).repeat_interleave(2, 1) for t in make_targets(faces, level))
        probability = score[..., 0].sigmoid()
        error = F.binary_cross_entropy_with_logits(score[..., 0], label.clamp(min=0), reduction="none")
        weight = torch.where(label > 0.5, 0.6 * (1 - probability) ** 2, 0.4 * probability**2) * (label >= 0)
        score_loss = score_loss + (weight.detach() * error).sum()
        chosen = label > 0.5
        count = count + chosen.sum()
        size = (target_sides[chosen][:, :2] + target_sides[chosen][:, 2:]).mean(1, keepdim=True).clamp(min=0.1)
        side_loss = side_loss + ((sides[chosen] - target_sides[chosen]).abs() / size).mean(1).sum()
        point_loss = point_loss + ((points[chosen] - target_points[chosen]).abs() / size).mean(1).sum()
    count = count.clamp(min=1)
    parts = {"score": score_loss / count, "sides": side_loss / count, "points": point_loss / count}
    return {"loss": 2 * parts["score"] + 2 * parts["sides"] + 6 * parts["points"], **parts}


def export(model: FaceDetector, path: Path) -> None:
    """Write the detector as ONNX (opset 17) by one rename.

    The input is fixed to 128 x 128, the one size it was trained for: SCRFD then resizes every picture to it, whatever
    detection size a caller asks for.
    """
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.onnx.export(
        ScrfdLayout(model).eval().cpu(), (torch.zeros(1, 3, CANVAS, CANVAS),), str(temporary), dynamo=False,
        opset_version=17, input_names=["input"], output_names=names,
    )  # fmt: skip
    temporary.replace(path)


def measure(path: Path, seed: int = 910_000, people: int = 150) -> dict[str, float]:
    """Shares of unseen pictures in which insightface's SCRFD finds the right number of faces, and its key point error.

    Keys: `one_face` (frames), `one_face_photos`, `two_faces`, `no_face`, each a share in 0..1 of pictures with exactly
    that many faces found at 0.5; `landmark_error`, mean, as a share of the distance between the eyes.
    """
    detector = model_zoo.get_model(str(path), providers=["CPUExecutionProvider"])
    detector.prepare(-1, input_size=(CANVAS, CANVAS), det_thresh=0.5)
    pool = picture_pool(people, seed)
    figures: dict[str, float] = {}
    errors: list[float] = []
    for name, images, faces in pool.groups():
        right = []
        for image, true in zip(images, faces):
            boxes, points = detector.detect(np.ascontiguousarray(image[..., ::-1]))
            right.append(len(boxes) == len(true))
            if len(boxes) == len(true) == 1:
                eyes = float(np.linalg.norm(true[0, 2] - true[0, 3]))
                errors.append(float(np.linalg.norm(points[0] - true[0, 2:], axis=1).mean()) / max(eyes, 1.0))
        figures[name] = float(np.mean(right))
    return figures | {"landmark_error": float(np.mean(errors))}


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train the detector and write ``out/detector.onnx``.

    Args:
        out: folder of the identity models.
        work: folder for checkpoints; a training that was interrupted goes on from there.
        device: `auto`, `cpu` or `cuda`.
        steps: optimizer steps of 32 pictures.

    Returns:
        The figures of `measure` on people not seen in training.
    """
    torch.manual_seed(0)
    where = choose_device(device)
    model = FaceDetector().to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pool = picture_pool(1200, seed=21)
    ema = Ema(model, 0.995)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        pictures, faces = training_pictures(pool, 32, rng)
        return detection_loss(model, pictures.to(where, memory_format=torch.channels_last), faces)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    model.train()
    train_loop("detector", model, optimizer, step_function, steps=steps or STEPS, folder=work, ema=ema, clip_norm=5.0)
    ema.copy_to(model)
    out.mkdir(parents=True, exist_ok=True)
    export(model, out / "detector.onnx")
    return measure(out / "detector.onnx")
