"""The metrics of one clip. No network here is a reward: what is optimised is not what is reported.

| metric              | definition                                                                                    |
|---------------------|-----------------------------------------------------------------------------------------------|
| `face_sim`          | at most 16 evenly spaced frames, the largest face of each, cosine with each reference by the  |
|                     | metric recogniser, mean over references and frames; frames without a face are left out        |
| `face_detect_rate`  | share of these frames in which a face was found                                               |
| `dynamic_magnitude` | frames thinned to about 8 per second as VBench does; mean over consecutive pairs of the mean  |
|                     | of the largest 5 % of flow magnitudes, times 256 / min(H, W). Flow by OpenCV's DIS (medium):  |
|                     | the motion reward is RAFT                                                                     |
| `prompt_score`      | P(action) P(place) of the prompt, by the face world's classifier; null for other worlds       |

The threshold-free value behind VBench's dynamic degree (Huang et al., VBench, CVPR 2024).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magicid.errors import RewardError
from magicid.recipe import Recipe
from magicid.rewards.frames import checked_frames, evenly_spaced
from magicid.rewards.identity import IdentityReward, identity_reward
from magicid.weights import resolve

if TYPE_CHECKING:
    from magicid.world.classifier import ActionPlaceClassifier

FACE_FRAMES = 16
MOTION_FPS = 8
TOP_SHARE = 0.05
REFERENCE_SIDE = 256  # px: magnitudes are given for frames of this shorter side
_FLOW_SIDE = 128  # px: DIS finds nothing in its coarser levels on smaller frames


class Metrics:
    """The metrics of a recipe. Make it with `from_recipe`.

    Args:
        faces: recogniser of the metrics, not the reward's; None: no face metrics.
        classifier: of action and place; None: no prompt score.
    """

    def __init__(self, faces: IdentityReward | None, classifier: ActionPlaceClassifier | None) -> None:
        self.faces = faces
        self.classifier = classifier

    @classmethod
    def from_recipe(cls, recipe: Recipe, device: str = "cpu") -> Metrics:
        """Load what the recipe's section `evaluation` names; an empty name leaves that metric null.

        Raises:
            BackboneError: a folder that is not there.
            RewardError: the metric recogniser is the reward's own, or a folder cannot be loaded.
        """
        faces, classifier = None, None
        if recipe.evaluation.identity:
            folder = resolve(recipe.evaluation.identity)
            if recipe.evaluation.identity == recipe.rewards.identity:
                raise RewardError(
                    f"evaluation.identity is the reward's own recogniser ({recipe.evaluation.identity})",
                    "name another insightface folder: what is optimised is not what is reported",
                )
            faces = IdentityReward.from_pretrained(
                folder,
                detection_size=recipe.rewards.detection_size,
                detection_threshold=recipe.identities.detection_threshold,
                device=device,
            )
        if recipe.evaluation.classifier:
            from magicid.world.classifier import ActionPlaceClassifier

            classifier_folder = resolve(recipe.evaluation.classifier)
            try:
                classifier = ActionPlaceClassifier.from_pretrained(classifier_folder, device)
            except Exception as error:
                problem = f"cannot load the classifier {classifier_folder}: {error}"
                raise RewardError(problem, "build it again") from error
        return cls(faces, classifier)

    def measure(
        self, frames: NDArray[np.uint8], fps: float, prompt: str, references: NDArray[np.float32]
    ) -> dict[str, Any]:
        """The measured columns of a MetricRow.

        Args:
            frames: uint8 RGB (F, H, W, 3).
            fps: of the file.
            prompt: what the clip was asked to show.
            references: unit embeddings (N, D) by the metric recogniser.

        Returns:
            face_sim, face_detect_rate, dynamic_magnitude, prompt_score, fps, frames, height, width, and `error`: None,
            or why a metric is null that should not be.

        Raises:
            RewardError: frames of another form.
        """
        frames = checked_frames(frames)
        row: dict[str, Any] = {
            "face_sim": None, "face_detect_rate": None, "dynamic_magnitude": None, "prompt_score": None,
            "fps": round(fps), "frames": len(frames), "height": frames.shape[1], "width": frames.shape[2],
        }  # fmt: skip
        reasons = []
        try:
            row["face_sim"], row["face_detect_rate"] = self.face_metrics(frames, references)
            if self.faces is not None and row["face_sim"] is None:
                reasons.append("face_sim: no face was found in any frame")
        except Exception as error:
            reasons.append(f"face_sim: {error}")
        try:
            row["dynamic_magnitude"] = dynamic_magnitude(frames, fps)
        except Exception as error:
            reasons.append(f"dynamic_magnitude: {error}")
        try:
            row["prompt_score"] = self.prompt_score(frames, prompt)
        except Exception as error:
            reasons.append(f"prompt_score: {error}")
        return {**row, "error": "; ".join(reasons) or None}

    def face_metrics(
        self, frames: NDArray[np.uint8], references: NDArray[np.float32]
    ) -> tuple[float | None, float | None]:
        """(face_sim -1..1 or None when no frame has a face, face_detect_rate 0..1); both None without a recogniser."""
        if self.faces is None:
            return None, None
        embeddings = self.faces.embed(frames[evenly_spaced(len(frames), FACE_FRAMES)])
        found = ~np.isnan(embeddings).any(axis=1)
        return identity_reward(embeddings, references), float(found.mean())

    def prompt_score(self, frames: NDArray[np.uint8], prompt: str) -> float | None:
        """P(action) P(place), 0..1; None without a classifier. Raises RewardError when the prompt names not both."""
        if self.classifier is None:
            return None
        from magicid.world.language import parse

        action, place = parse(prompt)
        if action is None or place is None:
            raise RewardError(f"the prompt {prompt!r} names no single action and place", "use the face-world prompts")
        actions, places = self.classifier.predict(frames[None])
        return float(actions[0, action]) * float(places[0, place])


def dynamic_magnitude(frames: NDArray[np.uint8], fps: float) -> float:
    """Mean over pairs of the mean of the largest 5 % flow magnitudes, px per thinned frame at a shorter side of 256 px.

    Args:
        frames: uint8 RGB (F, H, W, 3).
        fps: of the file; every round(fps / 8)-th frame is used.

    Raises:
        RewardError: fewer than two frames are left.
    """
    thinned = frames[:: max(1, round(fps / MOTION_FPS))]
    checked_frames(thinned, least=2)
    height, width = frames.shape[1:3]
    values = [top_mean(np.linalg.norm(flow, axis=-1)) for flow in dis_flow(thinned)]
    return float(np.mean(values)) * REFERENCE_SIDE / min(height, width)


def top_mean(magnitudes: NDArray[np.floating[Any]]) -> float:
    """Mean of the largest 5 % (at least one) of the values."""
    count = max(1, int(magnitudes.size * TOP_SHARE))
    return float(np.partition(magnitudes.ravel().astype(np.float64), -count)[-count:].mean())


def dis_flow(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """OpenCV's DIS flow (medium preset) float32 (F-1, H, W, 2), x and y in px of the given frames.

    Frames with a shorter side below 128 px are resized up for it, and the flow is scaled back.
    """
    height, width = frames.shape[1:3]
    scale = max(1.0, _FLOW_SIDE / min(height, width))
    size = (round(width * scale), round(height * scale))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    if scale > 1:
        grey = [cv2.resize(image, size, interpolation=cv2.INTER_LINEAR) for image in grey]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = []
    for first, second in itertools.pairwise(grey):
        flow = dis.calc(first, second, None)  # type: ignore[call-overload]
        if scale > 1:
            flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA)
            flow = flow / np.array([size[0] / width, size[1] / height], dtype=np.float32)
        flows.append(flow)
    return np.stack(flows).astype(np.float32)
