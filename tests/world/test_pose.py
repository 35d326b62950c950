"""The shipped pose regressor on unseen people: true head motion, and neither noise nor stillness passes for it."""

from __future__ import annotations

import numpy as np
import pytest

from magicid.evaluation.metrics.pose import LENGTHS, head_motion
from magicid.weights import resolve
from magicid.world.clip_pool import clip_pool
from magicid.world.pose import HeadPose, in_heads, targets
from magicid.world.renderer import FPS


@pytest.fixture(scope="module")
def pool():
    return clip_pool(48, seed=971_000)


@pytest.fixture(scope="module")
def model() -> HeadPose:
    return HeadPose.from_pretrained(resolve("world:pose"))


def test_head_motion_is_the_true_one(pool, model) -> None:
    found, true = model.poses(pool.frames), in_heads(targets(pool.pose))
    assert np.linalg.norm((found - true) * LENGTHS, axis=-1).mean() < 0.1  # half head heights
    motion = np.array([[head_motion(p, FPS) for p in poses] for poses in (found, true)])
    assert motion[0].mean() / motion[1].mean() == pytest.approx(1, abs=0.05)
    assert np.corrcoef(motion)[0, 1] > 0.97


def test_noise_is_no_motion(pool, model) -> None:
    rng = np.random.default_rng(0)

    def motion(frames: np.ndarray) -> float:
        return float(np.mean([head_motion(pose, FPS) for pose in model.poses(frames)]))

    noisy = np.clip(pool.frames + rng.normal(0, 8, pool.frames.shape), 0, 255).astype(np.uint8)
    still = np.repeat(noisy[:, 6:7], noisy.shape[1], axis=1)
    still = np.clip(still + rng.normal(0, 8, still.shape), 0, 255).astype(np.uint8)
    clean = motion(pool.frames)
    assert motion(noisy) == pytest.approx(clean, rel=0.05)
    assert motion(still) < 0.05 * clean
    large = pool.frames[:8].repeat(2, axis=2).repeat(2, axis=3)  # other sizes are brought to the network's
    assert motion(large) == pytest.approx(motion(pool.frames[:8]), rel=0.05)
