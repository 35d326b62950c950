"""The rows of a study: clips that are measured in worker processes, each group kept in a file of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid.evaluation import results
from magicid.evaluation.metrics import Sample
from magicid.laboratory.measuring import Measuring
from magicid.laboratory.people import Person
from magicid.schema import MetricRow


@dataclasses.dataclass(frozen=True)
class Asked:
    """One clip to be measured: of whom, by which training, and its frames uint8 (F, H, W, 3)."""

    person: Person
    train_seed: int
    prompt: str
    seed: int
    frames: NDArray[np.uint8]


class Rows:
    """Files of rows in a folder. One that is there is never made again.

    Args:
        references: name -> unit embeddings (P, D) of the person's photos, by the metric's recogniser.
        suffix: tells the files of one training seed from those of another.
    """

    def __init__(
        self,
        folder: Path,
        measuring: Measuring,
        references: dict[str, NDArray[np.float32]],
        *,
        fps: float,
        base_sha256: str,
        suffix: str,
    ) -> None:
        self.folder, self.suffix = folder, suffix
        self._measuring, self._references, self._fps, self.base_sha256 = measuring, references, fps, base_sha256
        self._pending: list[tuple[Path, list[MetricRow], list[Any]]] = []

    def file(self, method: str, setting: str, step: int, key: str = "") -> Path:
        """Where a group's rows lie, or will lie; by default those of all clips of this training seed."""
        parts = (method, setting.replace(", ", "+").replace("=", "-"), f"{step:04d}", key or self.suffix)
        return self.folder / f"{'-'.join(part for part in parts if part)}.parquet"

    def measure(self, method: str, setting: str, step: int, clips: Sequence[Asked], key: str = "") -> None:
        """Begin to measure a group of clips."""
        file = self.file(method, setting, step, key)
        if file.exists():
            return
        samples = [
            Sample(c.frames, self._fps, c.prompt, self._references[c.person.name], list(c.person.photos)) for c in clips
        ]
        rows = [
            MetricRow(
                clip_id="/".join(map(str, (method, setting, step, c.person.name, c.train_seed, c.seed, len(c.frames)))),
                identity_id=c.person.name, method=method, prompt=c.prompt, seed=c.seed, face_sim=None,
                face_detect_rate=None, dynamic_magnitude=None, prompt_score=None, fps=0, frames=0, height=0, width=0,
                video_uri=None, train_seed=c.train_seed, step=step, setting=setting, base_sha256=self.base_sha256,
            )
            for c in clips
        ]  # fmt: skip
        self._pending.append((file, rows, self._measuring.metrics(samples)))

    def collect(self, wait: bool = False) -> None:
        """Write the rows of what is measured; all that was begun, if `wait`."""
        left = []
        for file, rows, futures in self._pending:
            if not wait and not all(future.done() for future in futures):
                left.append((file, rows, futures))
                continue
            columns = [one for future in futures for one in future.result()]
            results.write(str(file), [dataclasses.replace(row, **values) for row, values in zip(rows, columns)])
        self._pending = left

    def read(self) -> list[MetricRow]:
        """Wait for what is being measured; all rows of the folder."""
        self.collect(wait=True)
        return results.read([str(self.folder)])
