"""VBench's own verdict beside ours, where its package is installed; `motion.py` has ours, from the definition.

The package asks for libraries that are older than the project's own, and its dynamic degree needs none of them:

    pip install --no-deps vbench==0.1.5 decord easydict

Its optical flow is the RAFT of its authors with the weights `raft-things.pth`, which it reads with `torch.load`; since
torch 2.6 that loads tensors and nothing else. Source: github.com/Vchitect/VBench, vbench/dynamic_degree.py (Apache
2.0).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from magicid.errors import RewardError
from magicid.evaluation.metrics.motion import thinned
from magicid.evaluation.metrics.sample import Columns, Sample
from magicid.rewards.frames import checked_frames

INSTALL = "pip install --no-deps vbench==0.1.5 decord easydict"


class VBenchMetrics:
    """dynamic_degree_vbench. Make it with `from_pretrained`.

    Args:
        model: VBench's `DynamicDegree`.
    """

    columns = ("dynamic_degree_vbench",)

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def from_pretrained(cls, weights: str | Path, device: str = "cpu") -> VBenchMetrics:
        """Load VBench's network.

        Args:
            weights: its RAFT checkpoint, `raft-things.pth`.

        Raises:
            RewardError: the package is not installed, or the file cannot be loaded.
        """
        try:
            from easydict import EasyDict
            from vbench.dynamic_degree import DynamicDegree
        except ImportError as error:
            raise RewardError(f"evaluation.vbench needs the vbench package: {error}", INSTALL) from error
        named = EasyDict(model=str(weights), small=False, mixed_precision=False, alternate_corr=False)
        try:
            return cls(DynamicDegree(named, device))
        except Exception as error:
            raise RewardError(
                f"VBench cannot load {weights}: {error}", "name its RAFT checkpoint, raft-things.pth"
            ) from error

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Columns:
        frames = checked_frames(thinned(sample.frames, sample.fps), least=2)
        with tempfile.TemporaryDirectory(prefix="magicid-vbench-") as folder:  # it reads files; PNG loses nothing
            for number, frame in enumerate(frames):
                cv2.imwrite(f"{folder}/{number:05d}.png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            return {"dynamic_degree_vbench": float(self._model.infer(folder))}
