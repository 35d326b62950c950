"""Embeddings of frames: CLIP from a folder, or in the face world the classifier's features.

temporal_consistency: mean cosine of adjacent frames (the paper reports it without a definition).
clip_t, clip_i: 100 x mean cosine of 16 frames with the prompt, and with the reference photos (Radford et al., CLIP,
2021, arXiv:2103.00020). Without CLIP there is no clip_t; `prompt_score` stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from magicid.errors import RewardError
from magicid.evaluation.metrics.sample import Columns, Sample
from magicid.rewards.frames import evenly_spaced

if TYPE_CHECKING:
    from magicid.world.classifier import ActionPlaceClassifier

CLIP_FRAMES = 16
_BATCH = 128


class FrameEmbedder(Protocol):
    """A network that makes a vector of a picture."""

    def images(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Unit embeddings (N, D) of RGB pictures (H, W, 3)."""

    def text(self, prompt: str) -> NDArray[np.float32] | None:
        """Unit embedding (D,) of a prompt; None where the network reads no text."""


class EmbeddingMetrics:
    """temporal_consistency, clip_t and clip_i by one embedder."""

    columns = ("temporal_consistency", "clip_t", "clip_i")

    def __init__(self, embedder: FrameEmbedder) -> None:
        self.embedder = embedder
        self._photos: dict[bytes, NDArray[np.float32]] = {}

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        lengths = [len(sample.frames) for sample in samples]
        vectors = self.embedder.images([frame for sample in samples for frame in sample.frames])
        parts = np.split(vectors, np.cumsum(lengths)[:-1])
        return [self._columns(sample, part) for sample, part in zip(samples, parts)]

    def _columns(self, sample: Sample, frames: NDArray[np.float32]) -> Columns:
        row: Columns = {}
        if len(frames) > 1:
            row["temporal_consistency"] = float((frames[:-1] * frames[1:]).sum(1).mean())
        few = frames[evenly_spaced(len(frames), CLIP_FRAMES)]
        prompt = self.embedder.text(sample.prompt) if sample.prompt else None
        if prompt is not None:
            row["clip_t"] = 100 * float((few @ prompt).mean())
        if len(sample.photos):
            row["clip_i"] = 100 * float((few @ self._references(sample.photos).T).mean())
        return row

    def _references(self, photos: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embeddings of the photos; those of the last few people are kept."""
        key = b"".join(np.ascontiguousarray(photo)[:: max(1, len(photo) // 8)].tobytes()[:4096] for photo in photos)
        if key not in self._photos:
            if len(self._photos) > 64:
                self._photos.clear()
            self._photos[key] = self.embedder.images(photos)
        return self._photos[key]


class ClipEmbedder:
    """transformers' CLIPModel with its processor. Make it with `from_pretrained`."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> ClipEmbedder:
        """Load a CLIP folder (safetensors); nothing is downloaded. Raises RewardError when it cannot be loaded."""
        try:
            from transformers import CLIPModel, CLIPProcessor

            model = CLIPModel.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
            processor = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            action = "put a transformers CLIP folder there, such as clip-vit-base-patch32 with model.safetensors"
            raise RewardError(f"cannot load CLIP from {folder}: {error}", action) from error
        return cls(cast(torch.nn.Module, model).to(device), processor)

    @torch.no_grad()
    def images(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(images), _BATCH):
            inputs = self.processor(images=list(images[start : start + _BATCH]), return_tensors="pt")
            parts.append(_pooled(self.model.get_image_features(inputs["pixel_values"].to(self.model.device))))
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu().numpy()

    @torch.no_grad()
    def text(self, prompt: str) -> NDArray[np.float32] | None:
        inputs = self.processor(text=[prompt], return_tensors="pt", truncation=True).to(self.model.device)
        features = _pooled(self.model.get_text_features(inputs["input_ids"], inputs["attention_mask"]))
        return F.normalize(features.float(), dim=-1)[0].cpu().numpy()


def _pooled(output: Any) -> torch.Tensor:
    """The projected embedding: transformers 5 wraps it, 4 returned it bare."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


class ClassifierEmbedder:
    """Frames by the features of the face world's classifier, each frame held still for a moment."""

    _SIDE, _HELD = 48, 5  # what the classifier was trained on; as many frames as its time filters see

    def __init__(self, classifier: ActionPlaceClassifier) -> None:
        self.classifier = classifier

    @torch.no_grad()
    def images(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        from magicid.world.classifier import to_input

        self.classifier.eval()
        device = next(self.classifier.parameters()).device
        parts = []
        for start in range(0, len(images), _BATCH):
            small = [
                cv2.resize(image, (self._SIDE, self._SIDE), interpolation=cv2.INTER_AREA)
                if image.shape[:2] != (self._SIDE, self._SIDE)
                else image
                for image in images[start : start + _BATCH]
            ]
            clips = to_input(np.stack(small).astype(np.uint8)[:, None]).to(device).expand(-1, -1, self._HELD, -1, -1)
            parts.append(self.classifier.trunk(clips).mean((2, 3, 4)).float())
        return F.normalize(torch.cat(parts), dim=-1).cpu().numpy()

    def text(self, prompt: str) -> NDArray[np.float32] | None:
        return None
