"""Is it the person? The cosine of the clip's faces with the references, by a recogniser that is no reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magicid.evaluation.metrics.sample import Columns, Sample, each
from magicid.rewards.frames import evenly_spaced
from magicid.rewards.identity import identity_reward

if TYPE_CHECKING:
    from magicid.rewards.identity import IdentityReward

FACE_FRAMES = 16


class FaceMetrics:
    """face_sim, face_sim_missing0 and face_detect_rate.

    Args:
        recogniser: an insightface folder, loaded (`IdentityReward.from_pretrained`); its `embed` is all that is used.
        threads: clips looked at at the same time.
    """

    columns = ("face_sim", "face_sim_missing0", "face_detect_rate")

    def __init__(self, recogniser: IdentityReward, threads: int = 1) -> None:
        self.recogniser = recogniser
        self.threads = threads

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        return each(self._one, samples, self.threads)

    def _one(self, sample: Sample) -> Columns:
        try:
            shown = sample.frames[evenly_spaced(len(sample.frames), FACE_FRAMES)]
            return face_columns(self.recogniser.embed(shown), sample.references)
        except Exception as error:
            return {"error": f"face_sim: {error}"}


def face_columns(embeddings: NDArray[Any], references: NDArray[Any] | None) -> Columns:
    """The three columns from embeddings.

    Args:
        embeddings: unit rows (F, D) of the largest face in each frame; NaN rows where none was found.
        references: unit rows (N, D), or None where there is nobody to compare with.

    Returns:
        face_sim (-1..1): mean cosine over references and frames with a face, null without any.
        face_sim_missing0 (-1..1): the same over all frames, one without a face counts 0.
        face_detect_rate (0..1).

    Raises:
        RewardError: references of another recogniser, or not finite.
    """
    found = float((~np.isnan(np.asarray(embeddings, dtype=np.float64)).any(axis=1)).mean())
    if references is None:
        return {"face_detect_rate": found}
    similarity = identity_reward(embeddings, references)
    if similarity is None:
        problem = "face_sim: no face was found in any frame"
        return {"face_sim_missing0": 0.0, "face_detect_rate": 0.0, "error": problem}
    return {"face_sim": similarity, "face_sim_missing0": similarity * found, "face_detect_rate": found}
