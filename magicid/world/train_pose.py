"""Trains the head pose regressor that only measures, on renders, whose poses are known.

Clips are degraded as for the other metric networks, so that softness, noise and flicker do not pass for motion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magicid.evaluation.metrics.pose import LENGTHS, head_motion
from magicid.world.clip_pool import clip_pool
from magicid.world.degradation import degrade, fold_frames, unfold_frames
from magicid.world.pose import _SPREAD, HeadPose, in_heads, targets, to_input
from magicid.world.renderer import FPS
from magicid.world.training_loop import Ema, autocast, choose_device, train_loop, written_whole

STEPS = 2400
CLIPS = 10  # of 13 frames: one batch


def measure(folder: Path, clips: int = 256, seed: int = 950_000) -> dict[str, float]:
    """On renders of unseen people.

    Keys: `error`, mean distance of found and true pose in half head heights; `motion_ratio`, found over true head
    motion, all clips together; `motion_correlation` over clips; the three again for degraded clips as `..._degraded`;
    `still`, head motion found in degraded frames held still, noise and flicker changing, over the mean true motion; and
    `jitter`, how much noise of 8 grey levels per pixel and frame adds to the head motion of clips, as a share.
    """
    model = HeadPose.from_pretrained(folder)
    pool = clip_pool(clips, seed)
    rng = np.random.default_rng(seed)
    true = in_heads(targets(pool.pose))
    motion = np.array([head_motion(pose, FPS) for pose in true])

    def found(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        poses = model.poses(frames)
        return poses, np.array([head_motion(pose, FPS) for pose in poses])

    figures = {}
    degraded = unfold_frames(degrade(fold_frames(pool.frames), rng))
    clean_motion = found(pool.frames)[1]
    for suffix, frames in (("", pool.frames), ("_degraded", degraded)):
        poses, estimate = found(frames)
        figures[f"error{suffix}"] = float(np.linalg.norm((poses - true) * LENGTHS, axis=-1).mean())
        figures[f"motion_ratio{suffix}"] = float(estimate.mean() / motion.mean())
        figures[f"motion_correlation{suffix}"] = float(np.corrcoef(estimate, motion)[0, 1])
    held = np.repeat(pool.frames[:64, 6:7], pool.frames.shape[1], axis=1)
    still = found(unfold_frames(degrade(fold_frames(held), rng)))[1]
    noisy = np.clip(pool.frames + rng.normal(0, 8, pool.frames.shape), 0, 255).astype(np.uint8)
    return figures | {
        "still": float(still.mean() / motion.mean()),
        "jitter": float(found(noisy)[1].mean() / clean_motion.mean() - 1),
    }


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train the regressor and write ``out`` (model.safetensors in float16, config.json).

    Args:
        out: folder to make.
        work: folder for checkpoints; a training that was interrupted goes on from there.
        device: `auto`, `cpu` or `cuda`.
        steps: optimizer steps of 130 frames.

    Returns:
        The figures of `measure`.
    """
    torch.manual_seed(0)
    where = choose_device(device)
    model = HeadPose().to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pool = clip_pool(5000, seed=61)
    true = targets(pool.pose)
    ema = Ema(model, 0.995)
    spread = _SPREAD.to(where)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = rng.integers(0, len(pool.frames), CLIPS)
        frames = unfold_frames(degrade(fold_frames(pool.frames[rows]), rng))
        images = to_input(frames.reshape(-1, *frames.shape[2:])).to(where, memory_format=torch.channels_last)
        wanted = torch.from_numpy(true[rows].reshape(-1, true.shape[-1])).to(where)
        with autocast(where, where.type == "cuda"):  # so small a network is faster in float32 on a CPU
            found = model(images)
        error = (found.float() - wanted) / spread
        return {"loss": torch.nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1)}

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    model.train()
    train_loop("pose", model, optimizer, step_function, steps=steps or STEPS, folder=work, ema=ema)
    ema.copy_to(model)
    with written_whole(out) as temporary:
        model.save_pretrained(temporary)
    return measure(out)
