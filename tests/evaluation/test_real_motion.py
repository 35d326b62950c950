"""Motion metrics on warps of a real photograph (scikit-image's astronaut, public domain) whose flow is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage import data

from magicid.evaluation.metrics import Sample
from magicid.evaluation.metrics.flicker import temporal_flickering
from magicid.evaluation.metrics.motion import MotionMetrics, dis_flow, dynamic_magnitude

SIDE = 256


def warped(matrices: list[np.ndarray]) -> np.ndarray:
    """The photograph under affine maps (2, 3) of its own 512 px, the middle 256 px of each."""
    photo = data.astronaut()
    frames = [
        cv2.warpAffine(photo, m, (512, 512), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT) for m in matrices
    ]
    return np.stack(frames)[:, 128:384, 128:384]


def shifted(frames: int, x: float, y: float = 0.0) -> np.ndarray:
    return warped([np.float64([[1, 0, x * t], [0, 1, y * t]]) for t in range(frames)])


def zoomed(frames: int, factor: float) -> np.ndarray:
    return warped([cv2.getRotationMatrix2D((256, 256), 0, factor**t) for t in range(frames)])


@pytest.mark.parametrize(("x", "y"), [(1.5, 0.0), (3.0, -2.0), (-7.0, 4.0)])
def test_the_flow_of_a_shift_is_the_shift(x: float, y: float) -> None:
    flow = dis_flow(shifted(3, x, y))[:, 24:-24, 24:-24]
    error = np.linalg.norm(flow - np.float32([x, y]), axis=-1)
    assert np.median(error) < 0.1
    assert error.mean() < 0.5


def test_the_flow_of_a_zoom_grows_from_the_middle() -> None:
    flow = dis_flow(zoomed(2, 1.04))[0]
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] - 128.0
    true = 0.04 * np.stack([columns, rows], -1)
    assert np.median(np.linalg.norm(flow - true, axis=-1)[24:-24, 24:-24]) < 0.2


def test_dynamic_magnitude_is_the_known_speed() -> None:
    for speed in (1.5, 4.0):
        frames = shifted(5, speed)[:, 32:-32, 32:-32]  # away from the reflected border
        assert dynamic_magnitude(frames, 8) * 192 / 256 == pytest.approx(speed, rel=0.15)
    assert dynamic_magnitude(shifted(3, 0), 8) < 0.01


def test_seven_pixels_a_step_are_dynamic_and_four_are_not() -> None:
    fast, slow, at_24 = MotionMetrics().measure(
        [Sample(shifted(9, 7.5), 8), Sample(shifted(9, 4), 8), Sample(shifted(25, 2.5), 24)]
    )
    assert (fast["dynamic_degree"], slow["dynamic_degree"]) == (1, 0)
    assert at_24["dynamic_degree"] == 1  # 2.5 px a frame at 24 per second are 7.5 a step of 1/8 s


def test_motion_is_explained_and_flicker_is_not() -> None:
    moving, still = shifted(5, 3.0), shifted(1, 0).repeat(5, 0)
    flicker = np.clip(still + np.float32([0, 12, 0, 12, 0])[:, None, None, None], 0, 255).astype(np.uint8)
    of_motion, of_flicker = MotionMetrics().measure([Sample(moving, 8), Sample(flicker, 8)])
    assert of_motion["warp_error"] < 6
    assert of_flicker["warp_error"] > 8
    assert temporal_flickering(moving) < temporal_flickering(flicker)  # a plain difference cannot tell them apart
    assert of_flicker["dynamic_magnitude"] < of_motion["dynamic_magnitude"] / 2
