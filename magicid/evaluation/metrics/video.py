"""Fréchet video distance: how far a set of clips lies from a set of reference clips.

Unterthiner et al., FVD, 2019: I3D trained on Kinetics-400, its 400 numbers a clip, at least 10 frames. The network is
the TorchScript file in common use. In the face world the classifier's features stand in. The distance is one of sets:
each clip's features are kept in its row, so that any sets can be compared later.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from magicid.errors import RewardError
from magicid.evaluation.metrics.sample import Columns, Sample, by_shape

if TYPE_CHECKING:
    from magicid.world.classifier import ActionPlaceClassifier

LEAST_FRAMES = 10
LEAST_CLIPS = 256
_BATCH = 16


class VideoEmbedder(Protocol):
    """A network that makes a vector of a clip."""

    def clips(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (B, D) of clips (B, F, H, W, 3)."""


class VideoMetrics:
    """video_features."""

    columns = ("video_features",)

    def __init__(self, embedder: VideoEmbedder) -> None:
        self.embedder = embedder

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        rows: list[Columns] = [{} for _ in samples]
        for positions in by_shape(samples):
            if len(samples[positions[0]].frames) < LEAST_FRAMES:
                for position in positions:
                    rows[position] = {"error": f"video_features: fewer than {LEAST_FRAMES} frames"}
                continue
            frames = np.stack([samples[position].frames for position in positions])
            for position, features in zip(positions, self.embedder.clips(frames)):
                rows[position] = {"video_features": [float(value) for value in features]}
        return rows


class I3DEmbedder:
    """I3D as TorchScript: `i3d_torchscript.pt`, or the one `.pt` file in the folder."""

    def __init__(self, model: Any, device: str = "cpu") -> None:
        self.model, self.device = model, device

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> I3DEmbedder:
        """Load the file. It is a program: use one whose origin you trust. Raises RewardError."""
        files = sorted(Path(folder).glob("*.pt"))
        action = "put i3d_torchscript.pt, the detector of the usual FVD code, into that folder"
        if len(files) != 1:
            raise RewardError(f"{folder} holds {len(files)} .pt files, not one", action)
        try:
            return cls(torch.jit.load(str(files[0]), map_location=device).eval(), device)
        except Exception as error:
            raise RewardError(f"cannot load I3D from {files[0]}: {error}", action) from error

    @torch.no_grad()
    def clips(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(frames), _BATCH):
            part = torch.from_numpy(frames[start : start + _BATCH]).permute(0, 4, 1, 2, 3).float().to(self.device)
            features = self.model(part, rescale=True, resize=True, return_features=True)
            parts.append(features.float().flatten(1).cpu().numpy())
        return np.concatenate(parts)


class ClassifierVideoEmbedder:
    """The last features of the face world's classifier, averaged over space and time."""

    def __init__(self, classifier: ActionPlaceClassifier) -> None:
        self.classifier = classifier

    @torch.no_grad()
    def clips(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        from magicid.world.classifier import to_input

        self.classifier.eval()
        device = next(self.classifier.parameters()).device
        parts = [
            self.classifier.trunk(to_input(frames[start : start + _BATCH]).to(device)).float().mean((2, 3, 4)).cpu()
            for start in range(0, len(frames), _BATCH)
        ]
        return torch.cat(parts).numpy()


def frechet_distance(features: NDArray[Any], reference: NDArray[Any]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features (N, D) and (M, D).

    Below 256 clips in a set it is biased upwards, and a warning says so.

    Raises:
        ValueError: other shapes, or fewer than two clips in a set.
    """
    first, second = np.asarray(features, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features of shapes {first.shape} and {second.shape} cannot be compared")
    if min(len(first), len(second)) < 2:
        raise ValueError("a Fréchet distance needs at least two clips on each side")
    if min(len(first), len(second)) < LEAST_CLIPS:
        warnings.warn(
            f"a Fréchet distance from {len(first)} and {len(second)} clips is biased; use {LEAST_CLIPS} or more",
            stacklevel=2,
        )
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    one, other = np.atleast_2d(one), np.atleast_2d(other)
    # tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other @ root), 0, None)).sum()
    offset = float(((first.mean(0) - second.mean(0)) ** 2).sum())
    return offset + float(np.trace(one) + np.trace(other) - 2 * cross)
