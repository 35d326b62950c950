"""All metrics of a recipe together: each clip's frames are decoded once and every metric looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magicid.errors import RewardError
from magicid.evaluation.metrics.actions import ActionMetrics
from magicid.evaluation.metrics.clip import ClassifierEmbedder, ClipEmbedder, EmbeddingMetrics
from magicid.evaluation.metrics.faces import FaceMetrics
from magicid.evaluation.metrics.flicker import FlickerMetrics
from magicid.evaluation.metrics.motion import MotionMetrics, raft_flow
from magicid.evaluation.metrics.pose import LandmarkPose, PoseMetrics
from magicid.evaluation.metrics.sample import Columns, Metric, Sample
from magicid.evaluation.metrics.vbench import VBenchMetrics
from magicid.evaluation.metrics.video import ClassifierVideoEmbedder, I3DEmbedder, VideoMetrics
from magicid.rewards.frames import checked_frames

if TYPE_CHECKING:
    from magicid.recipe import Evaluation, Recipe
    from magicid.rewards.identity import IdentityReward
    from magicid.world.classifier import ActionPlaceClassifier

DIS, LANDMARKS = "dis", "landmarks"
COLUMNS = (
    "face_sim", "face_sim_missing0", "face_detect_rate", "dynamic_degree", "dynamic_degree_vbench",
    "dynamic_magnitude", "head_motion",
    "temporal_flickering", "warp_error", "temporal_consistency", "clip_t", "clip_i", "action", "place", "prompt_score",
    "video_features",
)  # fmt: skip
"""What `Metrics.measure` fills, in the order of the tables; null where no network was named for it."""


class Metrics:
    """Several metrics as one. Make it with `from_recipe`.

    Args:
        parts: the metrics, any order.
        faces: the metric recogniser, which references are embedded with; None without one.
    """

    def __init__(self, parts: Sequence[Metric], faces: IdentityReward | None = None) -> None:
        self.parts = tuple(parts)
        self.faces = faces

    @classmethod
    def from_recipe(cls, recipe: Recipe, device: str = "cpu", threads: int = 1) -> Metrics:
        """Load what the recipe's section `evaluation` names; an empty name leaves those metrics null.

        Args:
            device: torch device of the networks.
            threads: clips that faces and flow are looked for in at the same time.

        Raises:
            BackboneError: a folder that is not there.
            RewardError: a metric network is the reward's own, or a folder cannot be loaded.
        """
        from magicid.weights import resolve

        wanted = recipe.evaluation
        for key, location, reward in (
            ("identity", wanted.identity, recipe.rewards.identity),
            ("motion", wanted.motion, recipe.rewards.motion),
        ):
            if location == reward:
                raise RewardError(
                    f"evaluation.{key} is the reward's own network ({location})",
                    "name another folder: what is optimised is not what is reported",
                )
        parts: list[Metric] = [FlickerMetrics()]
        faces = _faces(recipe, device) if wanted.identity else None
        if faces is not None:
            parts.append(FaceMetrics(faces, threads))
        if wanted.motion == DIS:
            parts.append(MotionMetrics(threads=threads))
        elif wanted.motion:
            parts.append(MotionMetrics(raft_flow(resolve(wanted.motion), device), 1))
        if wanted.vbench:
            parts.append(VBenchMetrics.from_pretrained(wanted.vbench, device))
        if wanted.pose == LANDMARKS and faces is not None:
            parts.append(PoseMetrics(LandmarkPose(faces)))
        elif wanted.pose and wanted.pose != LANDMARKS:
            parts.append(PoseMetrics(_loaded("pose regressor", "magicid.world.pose", "HeadPose", wanted.pose, device)))
        return cls([*parts, *_embedders(wanted, device)], faces)

    @property
    def looks_at_photos(self) -> bool:
        """Whether a metric compares frames with the reference photos."""
        return any(isinstance(part, EmbeddingMetrics) for part in self.parts)

    def measure(
        self,
        frames: NDArray[np.uint8],
        fps: float,
        prompt: str,
        references: NDArray[Any] | None = None,
        photos: Sequence[NDArray[np.uint8]] = (),
    ) -> Columns:
        """The measured columns of one clip; see `measure_many` and `Sample`."""
        return self.measure_many([Sample(frames, fps, prompt, references, photos)])[0]

    def measure_many(self, samples: Sequence[Sample]) -> list[Columns]:
        """The measured columns of each clip; networks see the clips in batches.

        Returns:
            For each clip COLUMNS, fps, frames, height, width, and `error`: None, or why something is null that should
            not be. A network that fails on one clip takes nothing from the others.

        Raises:
            RewardError: frames of another form.
        """
        rows = []
        for sample in samples:
            count, height, width = checked_frames(sample.frames).shape[:3]
            sizes = {"fps": round(sample.fps), "frames": count, "height": height, "width": width}
            rows.append({**dict.fromkeys(COLUMNS), **sizes})
        reasons: list[list[str]] = [[] for _ in samples]
        for part in self.parts:
            for row, why, values in zip(rows, reasons, _measured(part, samples)):
                if problem := values.pop("error", None):
                    why.append(problem)
                row.update(values)
        return [{**row, "error": "; ".join(why) or None} for row, why in zip(rows, reasons)]


def _measured(part: Metric, samples: Sequence[Sample]) -> list[Columns]:
    """The part's columns; where a batch fails, of each clip alone, so that one does not spoil the others."""
    try:
        return [dict(values) for values in part.measure(samples)]
    except Exception as error:
        if len(samples) > 1:
            return [_measured(part, [sample])[0] for sample in samples]
        return [{"error": f"{part.columns[0]}: {error}"}]


def _faces(recipe: Recipe, device: str) -> IdentityReward:
    from magicid.rewards.identity import IdentityReward
    from magicid.weights import resolve

    return IdentityReward.from_pretrained(
        resolve(recipe.evaluation.identity),
        detection_size=recipe.evaluation.detection_size or recipe.rewards.detection_size,
        detection_threshold=recipe.identities.detection_threshold,
        device=device,
    )


def _embedders(wanted: Evaluation, device: str) -> list[Metric]:
    """Actions, embeddings of frames and of clips: by the named networks, else by the classifier where there is one."""
    from magicid.weights import resolve

    parts: list[Metric] = []
    classifier: ActionPlaceClassifier | None = None
    if wanted.classifier:
        classifier = _loaded(
            "classifier", "magicid.world.classifier", "ActionPlaceClassifier", wanted.classifier, device
        )
        parts.append(ActionMetrics(classifier))
    if wanted.clip:
        parts.append(EmbeddingMetrics(ClipEmbedder.from_pretrained(resolve(wanted.clip), device)))
    elif classifier is not None:
        parts.append(EmbeddingMetrics(ClassifierEmbedder(classifier)))
    if wanted.video:
        parts.append(VideoMetrics(I3DEmbedder.from_pretrained(resolve(wanted.video), device)))
    elif classifier is not None:
        parts.append(VideoMetrics(ClassifierVideoEmbedder(classifier)))
    return parts


def _loaded(what: str, module: str, name: str, location: str, device: str) -> Any:
    """A network of the face world by its `from_pretrained`."""
    import importlib

    from magicid.weights import resolve

    folder = resolve(location)
    try:
        return getattr(importlib.import_module(module), name).from_pretrained(folder, device)
    except Exception as error:
        raise RewardError(f"cannot load the {what} {folder}: {error}", "build it again") from error
