"""The two face recognisers of the face world, trained with the ArcFace loss and run by insightface's ArcFaceONNX.

One is the identity reward, the other only measures: it has another seed, another depth and width, and was trained on
other people, so that what was optimised against the first is not graded by it.
Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019, arXiv:1801.07698.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from insightface.app import FaceAnalysis
from insightface.utils.face_align import arcface_dst
from numpy.typing import NDArray
from torch import Tensor, nn

from magicid.world.degradation import degrade
from magicid.world.face_pool import FaceImages, face_images
from magicid.world.training_loop import Ema, autocast, choose_device, train_loop

CROP = 112
EMBEDDING = 128


@dataclass(frozen=True)
class Recipe:
    """One recogniser: its shape and its training people."""

    name: str
    seed: int
    people: int
    widths: tuple[int, int, int]
    depths: tuple[int, int, int]
    steps: int


REWARD = Recipe("identity", seed=31, people=4200, widths=(32, 64, 96), depths=(1, 2, 1), steps=1500)
METRIC = Recipe("identity_metric", seed=7331, people=4200, widths=(40, 56, 112), depths=(1, 1, 2), steps=1300)
RECIPES = {recipe.name: recipe for recipe in (REWARD, METRIC)}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Recogniser(nn.Module):
    """Aligned crops (B, 3, 112, 112), RGB scaled to -1..1, to embeddings (B, 128) of no particular length."""

    def __init__(self, widths: tuple[int, int, int], depths: tuple[int, int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for index, (width, depth) in enumerate(zip(widths, depths)):
            # The crops hold little detail (a head of 26 pixels), so the first layer strides by four at once.
            kernel, stride = (7, 4) if index == 0 else (3, 2)
            first = nn.Conv2d(inputs, width, kernel, stride, kernel // 2, bias=False)
            layers += [first, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers += [_Residual(width) for _ in range(depth)]
            inputs = width
        self.trunk = nn.Sequential(*layers)
        self.gather = nn.Sequential(
            nn.Conv2d(inputs, inputs, CROP // 16, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.Flatten()
        )
        self.project = nn.Sequential(nn.Linear(inputs, EMBEDDING, bias=False), nn.BatchNorm1d(EMBEDDING))

    def forward(self, crops: Tensor) -> Tensor:
        return self.project(self.gather(self.trunk(crops)))


class ArcFaceHead(nn.Module):
    """Class centres and the additive angular margin; returns the cross entropy."""

    def __init__(self, people: int, scale: float = 24.0) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(people, EMBEDDING) * 0.05)
        self.scale = scale

    def forward(self, embeddings: Tensor, people: Tensor, margin: float) -> Tensor:
        cosine = F.normalize(embeddings.float()) @ F.normalize(self.centres.float()).T
        own = cosine.gather(1, people[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
        with_margin = torch.cos(own.acos() + margin)
        # Past pi - margin the cosine would rise again; there a linear penalty takes over (as in the original code).
        with_margin = torch.where(own > np.cos(np.pi - margin), with_margin, own - np.sin(np.pi - margin) * margin)
        return F.cross_entropy(self.scale * cosine.scatter(1, people[:, None], with_margin), people)


def similarity(landmarks: NDArray[np.float32]) -> NDArray[np.float64]:
    """Least-squares similarity transforms (N, 2, 3) from landmarks (N, 5, 2) to ArcFace's template of 112 pixels.

    The same map as insightface's `estimate_norm` (Umeyama 1991), for many faces at once.
    """
    source = landmarks.astype(np.float64)
    source_mean, target_mean = source.mean(1, keepdims=True), arcface_dst.mean(0, keepdims=True)[None]
    s, t = source - source_mean, arcface_dst[None] - target_mean
    power = np.maximum((s**2).sum((1, 2)), 1e-6)
    a = (s * t).sum((1, 2)) / power
    b = (s[..., 0] * t[..., 1] - s[..., 1] * t[..., 0]).sum(1) / power
    linear = np.stack([np.stack([a, -b], -1), np.stack([b, a], -1)], 1)
    shift = target_mean[:, 0] - np.einsum("nij,nj->ni", linear, source_mean[:, 0])
    return np.concatenate([linear, shift[..., None]], 2)


def jitter(landmarks: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Move landmarks (N, 5, 2) as a detector's errors would: each one a little, and all together."""
    eyes = np.linalg.norm(landmarks[:, 0] - landmarks[:, 1], axis=-1).clip(2)[:, None, None]
    number = len(landmarks)
    each = rng.normal(0, 0.04, landmarks.shape)
    together = rng.normal(0, 0.05, (number, 1, 2))
    centre = landmarks.mean(1, keepdims=True)
    zoom = np.exp(rng.normal(0, 0.04, (number, 1, 1)))
    return (centre + (landmarks - centre) * zoom + (each + together) * eyes).astype(np.float32)


def aligned_crops(images: list[NDArray[np.uint8]], landmarks: NDArray[np.float32]) -> Tensor:
    """Crops (N, 3, 112, 112) in -1..1, made as insightface's `norm_crop` makes them."""
    crops = np.stack([
        cv2.warpAffine(image, matrix, (CROP, CROP), borderValue=0.0)
        for image, matrix in zip(images, similarity(landmarks))
    ])  # fmt: skip
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)


def training_crops(pool: FaceImages, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Crops (B, 3, 112, 112) and people (B,): half from clips, half from photos, most of them degraded."""
    images: list[NDArray[np.uint8]] = []
    landmarks, people = [], []
    for source, share in ((pool.frames, 0.6), (pool.photos, 0.4)):
        rows = rng.integers(0, len(source.images), round(batch * share))
        images += list(degrade(source.images[rows], rng, amount=0.8))
        landmarks.append(source.landmarks[rows])
        people.append(source.people[rows])
    crops = aligned_crops(images, jitter(np.concatenate(landmarks), rng))
    return crops, torch.from_numpy(np.concatenate(people)).long()


def export(model: Recogniser, path: Path) -> None:
    """Write the recogniser as ONNX (opset 17), without any scaling node in front: ArcFaceONNX then scales to -1..1."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.onnx.export(
        model.eval().cpu(), (torch.zeros(1, 3, CROP, CROP),), str(temporary), dynamo=False, opset_version=17,
        input_names=["input"], output_names=["embedding"],
        dynamic_axes={"input": {0: "faces"}, "embedding": {0: "faces"}},
    )  # fmt: skip
    temporary.replace(path)


def embed_pictures(analysis: FaceAnalysis, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit embeddings (N, 128) of the largest face in each RGB picture (N, H, W, 3); NaN where none is found."""
    rows = np.full((len(images), EMBEDDING), np.nan, dtype=np.float32)
    for row, image in zip(rows, images):
        faces = analysis.get(np.ascontiguousarray(image[..., ::-1]), max_num=1)
        if faces:
            row[:] = faces[0].normed_embedding
    return rows


def pair_scores(
    embeddings: NDArray[np.float32], people: NDArray[np.int64], seed: int, pairs: int = 4000
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines of random pairs of the same person, and of different people. Rows with NaN are left out."""
    rng = np.random.default_rng(seed)
    good = ~np.isnan(embeddings).any(1)
    embeddings, people = embeddings[good], people[good]
    first, second = rng.integers(0, len(people), (2, 40 * pairs))
    cosine = (embeddings[first] * embeddings[second]).sum(1)
    same = (people[first] == people[second]) & (first != second)
    return cosine[same][:pairs], cosine[people[first] != people[second]][:pairs]


def best_threshold(same: NDArray[np.float32], different: NDArray[np.float32]) -> float:
    """The cosine that separates the two kinds of pair with the fewest errors, both kinds weighing the same."""
    grid = np.linspace(-0.2, 0.95, 231)
    accuracy = [(same > g).mean() + (different <= g).mean() for g in grid]
    return float(np.mean(grid[np.flatnonzero(np.isclose(accuracy, np.max(accuracy)))]))


def verification(same: NDArray[np.float32], different: NDArray[np.float32], threshold: float) -> float:
    """Share of right decisions at ``threshold``, both kinds of pair weighing the same."""
    return float(((same > threshold).mean() + (different <= threshold).mean()) / 2)


def measure(folder: Path, people: int = 150, seed: int = 920_000) -> dict[str, float]:
    """Verification of unseen people through insightface's FaceAnalysis, detector included.

    The threshold is chosen on ``people`` people and applied to as many others. Pairs mix frames of 48 pixels from two
    clips and photos of 96 pixels. Keys: `verification`, `threshold`, `same`, `different` (mean cosines), `found`.
    """
    analysis = FaceAnalysis(name=str(folder.resolve()), providers=["CPUExecutionProvider"])
    analysis.prepare(-1, det_size=(128, 128))
    scores = []
    found = 1.0
    for part in (0, 1):
        pool = face_images(people, seed + part, clips=2, frames_per_clip=3, photos=3)
        embeddings = np.concatenate([embed_pictures(analysis, s.images) for s in (pool.frames, pool.photos)])
        who = np.concatenate([pool.frames.people, pool.photos.people])
        scores.append(pair_scores(embeddings, who, seed + part))
        found = float(1 - np.isnan(embeddings).any(1).mean())
    threshold = best_threshold(*scores[0])
    same, different = scores[1]
    return {
        "verification": verification(same, different, threshold),
        "threshold": threshold,
        "same": float(same.mean()),
        "same_std": float(same.std()),
        "different": float(different.mean()),
        "different_std": float(different.std()),
        "found": found,
    }


def _train(recipe: Recipe, out: Path, work: Path, device: str, steps: int | None) -> dict[str, Any]:
    where = choose_device(device)
    torch.manual_seed(recipe.seed)
    model = Recogniser(recipe.widths, recipe.depths)
    both = nn.ModuleDict({"model": model, "head": ArcFaceHead(recipe.people)})
    both.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pool = face_images(recipe.people, recipe.seed, clips=1, frames_per_clip=8, photos=3)
    total = steps or recipe.steps
    ema = Ema(both, 0.99)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        crops, people = training_crops(pool, 128, rng)
        with autocast(where):
            embeddings = model(crops.to(where, memory_format=torch.channels_last))
        margin = 0.35 * min(1.0, max(0.0, step / total - 0.2) / 0.3)
        loss = both["head"](embeddings, people.to(where), margin)
        return {"loss": loss}

    optimizer = torch.optim.AdamW(
        [
            {"params": model.parameters(), "lr": 2e-3, "weight_decay": 0.02},
            {"params": both["head"].parameters(), "lr": 6e-3, "weight_decay": 0.0},
        ]
    )
    both.train()
    train_loop(
        recipe.name, both, optimizer, step_function, steps=total, folder=work, seed=recipe.seed, ema=ema, clip_norm=5.0
    )
    ema.copy_to(both)
    export(model, out / "recognizer.onnx")
    return measure(out)


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train the recogniser of the identity reward and write ``out/recognizer.onnx`` beside the detector.

    Args:
        out: folder that holds detector.onnx already.
        work: folder for checkpoints; a training that was interrupted goes on from there.
        device: `auto`, `cpu` or `cuda`.
        steps: optimizer steps of 128 crops.

    Returns:
        The figures of `measure`.
    """
    return _train(REWARD, out, work, device, steps)


def train_metric(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train the recogniser that only measures; the detector is copied from the folder ``identity`` beside ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out.parent / "identity" / "detector.onnx", out / "detector.onnx")
    return _train(METRIC, out, work, device, steps)
