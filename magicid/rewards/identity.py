"""R_id: the cosine of face embeddings, by an insightface folder (SCRFD detector and ArcFace recogniser as ONNX).

Source: MagicID, the identity reward; Deng et al., ArcFace, CVPR 2019, arXiv:1801.07698.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid.errors import RewardError
from magicid.rewards.frames import checked_frames

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Face:
    """One face of a picture: box (4,) x1 y1 x2 y2 and landmarks (5, 2) in px, detector score 0..1, unit embedding (D,).

    Landmarks: left eye, right eye, nose, left and right corner of the mouth, as seen in the picture.
    """

    box: FloatArray
    landmarks: FloatArray
    score: float
    embedding: FloatArray

    @property
    def shorter_side(self) -> float:
        """Of the box, px."""
        return float(min(self.box[2] - self.box[0], self.box[3] - self.box[1]))


class IdentityReward:
    """A face detector and a face recogniser. Make it with `from_pretrained`.

    Args:
        detector: insightface's SCRFD, prepared.
        recogniser: insightface's ArcFaceONNX.
    """

    def __init__(self, detector: Any, recogniser: Any) -> None:
        self._detector = detector
        self._recogniser = recogniser

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        detection_size: int = 640,
        detection_threshold: float = 0.5,
        device: str = "cpu",
    ) -> IdentityReward:
        """Load a folder that holds an SCRFD detector and an ArcFace recogniser; nothing is downloaded.

        Args:
            folder: any file names; insightface tells the models apart by their shapes.
            detection_size: side of the detector's square input, px; a detector with a fixed input keeps its own.
            detection_threshold: faces with a lower score are not seen.
            device: `cuda...` uses the CUDA provider of onnxruntime where there is one.

        Raises:
            RewardError: no such folder, or not both models in it.
        """
        folder = Path(folder).expanduser().resolve()
        action = "point the recipe at a folder with an SCRFD detector and an ArcFace recogniser, both as ONNX"
        if not folder.is_dir():  # insightface would go on to download a pack of this name
            raise RewardError(f"no identity model folder {folder}", action)
        with _quiet():
            try:
                from insightface.app import FaceAnalysis

                analysis = FaceAnalysis(
                    name=str(folder),
                    allowed_modules=["detection", "recognition"],
                    providers=_providers(device),
                    sess_options=_session_options(),
                )
                analysis.prepare(
                    0 if device.startswith("cuda") else -1,
                    det_thresh=detection_threshold,
                    det_size=(detection_size, detection_size),
                )
            except Exception as error:
                problem = str(error) or "no detector in it"
                raise RewardError(f"{folder} is not an insightface folder: {problem}", action) from error
        if "recognition" not in analysis.models:
            raise RewardError(f"{folder} holds no face recogniser", action)
        if not analysis.det_model.use_kps:
            raise RewardError(f"the detector in {folder} gives no landmarks", action)
        return cls(analysis.det_model, analysis.models["recognition"])

    def detect(self, image_HWC: NDArray[np.uint8]) -> list[Face]:
        """All faces of an RGB picture uint8 (H, W, 3), the largest box first. Raises RewardError."""
        image = checked_frames(image_HWC[None])[0]
        boxes, landmarks = self._boxes(image)
        if not len(boxes):
            return []
        embeddings = self._recognise([image] * len(boxes), landmarks)
        return [
            Face(box[:4], points, float(box[4]), embedding)
            for box, points, embedding in zip(boxes, landmarks, embeddings)
        ]

    def embed(self, frames: NDArray[np.uint8]) -> FloatArray:
        """Embeddings float32 (F, D) of the largest face in each frame, unit length; NaN rows where none was found.

        Args:
            frames: uint8 RGB (F, H, W, 3).

        Raises:
            RewardError: frames of another form, or a model that fails or answers with non-finite numbers.
        """
        frames = checked_frames(frames)
        found: list[int] = []
        landmarks: list[FloatArray] = []
        for number, frame in enumerate(frames):
            boxes, points = self._boxes(frame)
            if len(boxes):
                found.append(number)
                landmarks.append(points[0])
        rows = np.full((len(frames), self.dimension), np.nan, dtype=np.float32)
        if found:
            rows[found] = self._recognise([frames[number] for number in found], np.stack(landmarks))
        return rows

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return int(self._recogniser.output_shape[-1])

    def _boxes(self, image: NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        """Boxes with scores (N, 5) and landmarks (N, 5, 2), the largest first."""
        try:
            boxes, landmarks = self._detector.detect(np.ascontiguousarray(image[..., ::-1]))
        except Exception as error:
            raise RewardError(f"the face detector failed: {error}", "check the model folder and the clip") from error
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        order = np.argsort(-area, kind="stable")
        return boxes[order].astype(np.float32), landmarks[order].astype(np.float32)

    def _recognise(self, images: list[NDArray[np.uint8]], landmarks: FloatArray) -> FloatArray:
        """Unit embeddings (N, D) of one face in each picture, by its landmarks (N, 5, 2)."""
        from insightface.utils import face_align

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of scikit-image, by insightface's alignment
                side = self._recogniser.input_size[0]
                crops = [
                    face_align.norm_crop(np.ascontiguousarray(image[..., ::-1]), landmark=points, image_size=side)
                    for image, points in zip(images, landmarks)
                ]
                if self._recogniser.input_shape[0] == 1:  # exported for one face at a time
                    raw = np.concatenate([self._recogniser.get_feat(crop) for crop in crops])
                else:
                    raw = self._recogniser.get_feat(crops)
        except Exception as error:
            raise RewardError(f"the face recogniser failed: {error}", "check the model folder and the clip") from error
        raw = np.asarray(raw, dtype=np.float64).reshape(len(images), -1)
        length = np.linalg.norm(raw, axis=1, keepdims=True)
        if not np.isfinite(raw).all() or (length == 0).any():
            raise RewardError("the face recogniser gave non-finite or zero embeddings", "check the model folder")
        return (raw / length).astype(np.float32)


def identity_reward(embeddings: NDArray[Any], references: NDArray[Any]) -> float | None:
    """R_id: the mean cosine over all frames with a face and all references, -1..1; None when no frame has a face.

    Args:
        embeddings: unit rows (F, D); NaN rows where no face was found.
        references: unit rows (N, D).

    Raises:
        RewardError: no references, non-finite ones, or another D (made by another recogniser).
    """
    frames, people = np.asarray(embeddings, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if people.ndim != 2 or not people.size or not np.isfinite(people).all():
        raise RewardError(f"reference embeddings of shape {people.shape} are empty or not finite", "check the identity")
    if frames.ndim != 2 or frames.shape[1] != people.shape[1]:
        raise RewardError(
            f"frame embeddings {frames.shape} do not fit the references {people.shape}",
            "make both with the same recogniser",
        )
    found = frames[~np.isnan(frames).any(axis=1)]
    if not len(found):
        return None
    return float((found @ people.T).mean())


def _providers(device: str) -> list[str]:
    import onnxruntime

    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def _session_options() -> Any:
    """As many threads as torch may use in this process, and none that spins while several processes share the cores."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """insightface's loader may print to standard output, and what it imports warns."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
