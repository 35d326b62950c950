"""The question of the paper as numbers: does a method have more of the one where it has as much of the other?

Self-reconstruction trades motion for identity as it goes on, from the base model at step 0; its checkpoints are a curve
in the plane of face_sim and motion, a straight line between two of them. A method is compared with the point of that
curve at its own face_sim (ratio of motions), and with the point at its own motion (difference of face_sim). Where the
curve crosses a value more than once the best crossing counts; where it never reaches it, the nearest end. Intervals are
those of `intervals.py` over clips that the method and every checkpoint have of the same person, prompt and seed: one
resample moves the method and the curve together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicid.evaluation import intervals, results
from magicid.evaluation.intervals import Interval, hierarchical
from magicid.evaluation.names import MOTIONS
from magicid.schema import MetricRow

RECONSTRUCTION = ("sft", "dreambooth", "magicme", "sft_moving", "sft_captions", "sft_moving_captions")
"""Methods that train on the photos alone."""
Curve = tuple[str, str]
"""(method, setting) of a self-reconstruction."""


@dataclass(frozen=True)
class Beyond:
    """A method's last step against one curve, by one measure of motion.

    Attributes:
        motion: its motion over the curve's at its face_sim.
        identity: its face_sim minus the curve's at its motion.
        reached: whether the curve has such a face_sim, and such a motion, anywhere; else its nearest end counts.
    """

    method: str
    setting: str
    step: int
    curve: Curve
    measure: str
    motion: Interval
    identity: Interval
    reached: tuple[bool, bool]


def beyond(rows: Sequence[MetricRow], whole: str = "identity_id") -> list[Beyond]:
    """Every method that is no self-reconstruction against every curve of self-reconstruction, by both motions.

    Args:
        whole: what a resample draws as wholes. People, or with `prompt` the prompts, so that the interval tells what
            hangs on their choice, and hardly what clips of a person have in common; the intervals then count prompts as
            their `people`.
    """
    rows = results.of_usual_length(rows)
    curves = {key: own for key, own in results.grouped(rows, ["method", "setting"]).items() if key[0] in RECONSTRUCTION}
    base, found = [row for row in rows if row.method == "base"], []
    last = [row for row in results.last_steps(rows) if row.method not in (*RECONSTRUCTION, "base", "renderer")]
    for (method, setting, step), own in results.grouped(last, results.BY).items():
        for key, of_curve in curves.items():
            checkpoints = [base, *(part for _, part in sorted(results.grouped(of_curve, ["step"]).items()))]
            for measure in MOTIONS:
                both = _against(own, [part for part in checkpoints if part], measure, whole)
                if both is not None:
                    found.append(Beyond(method, setting, step, (key[0], key[1]), measure, *both))
    return found


def _against(
    own: Sequence[MetricRow], checkpoints: Sequence[Sequence[MetricRow]], measure: str, whole: str
) -> tuple[Interval, Interval, tuple[bool, bool]] | None:
    """(ratio of motion, difference of face_sim, whether each is reached); None without clips that all of them have."""
    matched = results.matched([own, *checkpoints], ["face_sim", measure], whole)
    if not matched:
        return None
    wholes, seeds, values = zip(*matched)

    def motion(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(means[..., 1] / _read(means[..., 2::2], means[..., 3::2], means[..., 0]))

    def identity(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(means[..., 0] - _read(means[..., 3::2], means[..., 2::2], means[..., 1]))

    array = np.array(values)
    face, moves, *curve = intervals.means(array, wholes, seeds)
    reached = _within(face, curve[::2]), _within(moves, curve[1::2])
    one, other = (hierarchical(array, wholes, seeds, statistic=f) for f in (motion, identity))
    return (one, other, reached) if one and other else None


def _within(value: float, among: Sequence[float]) -> bool:
    return bool(min(among) <= value <= max(among))


def _read(x: NDArray[np.float64], y: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest y of a polyline at an x; that of the vertex whose x is nearest where the line never reaches it.

    Args:
        x, y: (..., S) vertices in their order.
        at: (...).
    """
    nearest = np.abs(x - at[..., None]).argmin(-1)[..., None]
    found = np.take_along_axis(y, nearest, -1)[..., 0]
    reached = np.full(at.shape, -np.inf)
    for s in range(x.shape[-1] - 1):
        left, right = x[..., s] - at, x[..., s + 1] - at
        crosses = left * right <= 0
        width = np.where(left == right, 1.0, left - right)
        share = np.where(left == right, 0.0, left / width)
        value = y[..., s] + share * (y[..., s + 1] - y[..., s])
        reached = np.where(crosses, np.maximum(reached, value), reached)
    return np.where(np.isfinite(reached), reached, found)
