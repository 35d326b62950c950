"""Trains torchvision's RAFT (small) on the renderer's exact optical flow.

RAFT needs 128 pixels a side, so frames are resized from 48 to 128 and the flow grows with them; whoever uses the
network divides its flow by the same factor. Some pairs stand still and differ only in noise and flicker, so that
these do not pass for motion. Teed and Deng, RAFT, ECCV 2020, arXiv:2003.12039.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_small

from magicid.rewards.dynamics import MotionReward
from magicid.world.clip_pool import ClipPool, clip_pool
from magicid.world.degradation import degrade, fold_frames, unfold_frames
from magicid.world.training_loop import Ema, autocast, choose_device, train_loop, written_whole

RAFT_SIDE = 128
FRAME_SIDE = 48
UPDATES = 6
STEPS = 3200
BATCH = 6


def raft_input(frames_NHWC: NDArray[np.uint8]) -> Tensor:
    """Frames (N, H, W, 3) uint8 to (N, 3, h, w) in -1..1 with the shorter side at least 128 pixels."""
    images = torch.from_numpy(np.ascontiguousarray(frames_NHWC)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    shorter = min(images.shape[-2:])
    if shorter >= RAFT_SIDE:
        return images
    return F.interpolate(images, scale_factor=RAFT_SIDE / shorter, mode="bilinear", align_corners=False)


def reward_flow(reward: MotionReward, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Flow (N, H, W, 2) of the motion reward, in pixels of the given frames (N, H, W, 3)."""
    flows = [reward.flow(np.stack(pair))[0] for pair in zip(first, second)]
    return np.stack(flows).transpose(0, 2, 3, 1)


def training_pairs(pool: ClipPool, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second frames (B, 3, 128, 128), flow (B, 2, 128, 128) in 128-pixel units, validity (B, 128, 128)."""
    rows, times = rng.integers(0, len(pool.frames), batch), rng.integers(0, pool.flow.shape[1], batch)
    pairs = np.stack([pool.frames[rows, times], pool.frames[rows, times + 1]], 1)
    flow, valid = pool.flow[rows, times].astype(np.float32), pool.flow_valid[rows, times].copy()
    still = rng.random(batch) < 0.12
    pairs[still, 1] = pairs[still, 0]
    flow[still], valid[still] = 0, True
    pairs = unfold_frames(degrade(fold_frames(pairs), rng, amount=0.7))
    images = raft_input(pairs.reshape(-1, *pairs.shape[2:])).unflatten(0, (batch, 2))
    factor = RAFT_SIDE / flow.shape[2]
    target = torch.from_numpy(flow).permute(0, 3, 1, 2) * factor
    # The true flow is given per small pixel; between pixels that move together it is smooth, so it is interpolated.
    target = F.interpolate(target, size=(RAFT_SIDE, RAFT_SIDE), mode="bilinear", align_corners=False)
    weight = F.interpolate(torch.from_numpy(valid)[:, None].float(), size=(RAFT_SIDE, RAFT_SIDE), mode="nearest")[:, 0]
    return images[:, 0], images[:, 1], target, weight


def measure(folder: Path, clips: int = 48, seed: int = 940_000) -> dict[str, float]:
    """Mean end-point error in pixels of 48 x 48 frames, on unseen clips, over valid pixels.

    Keys: `epe`, `epe_moving` (true flow above half a pixel), `epe_degraded`, the same for OpenCV's DIS (medium) as
    `dis_epe`, `dis_epe_moving`, `dis_epe_degraded`; `still` is the mean flow found between two noisy copies of one
    frame, and `dis_still` DIS's.
    """
    reward = MotionReward.from_pretrained(folder)
    pool = clip_pool(clips, seed, with_flow=True)
    rng = np.random.default_rng(seed)
    times = rng.integers(0, pool.flow.shape[1], (clips, 3))
    rows = np.arange(clips)[:, None]
    pairs = np.stack([pool.frames[rows, times], pool.frames[rows, times + 1]], 2).reshape(-1, 2, *pool.frames.shape[2:])
    flow = pool.flow[rows, times].astype(np.float32).reshape(len(pairs), *pool.flow.shape[2:])
    valid = pool.flow_valid[rows, times].reshape(len(pairs), *pool.flow.shape[2:4])
    moving = valid & (np.linalg.norm(flow, axis=-1) > 0.5)
    degraded = unfold_frames(degrade(fold_frames(pairs), rng))
    copies = np.clip(np.repeat(pairs[:, :1], 2, 1) + rng.normal(0, 4, pairs.shape), 0, 255).astype(np.uint8)
    figures = {}
    for prefix, estimate in (("", lambda a, b: reward_flow(reward, a, b)), ("dis_", dis_flow)):
        error = np.linalg.norm(estimate(pairs[:, 0], pairs[:, 1]) - flow, axis=-1)
        figures[f"{prefix}epe"] = float(error[valid].mean())
        figures[f"{prefix}epe_moving"] = float(error[moving].mean())
        error = np.linalg.norm(estimate(degraded[:, 0], degraded[:, 1]) - flow, axis=-1)
        figures[f"{prefix}epe_degraded"] = float(error[valid].mean())
        figures[f"{prefix}still"] = float(np.linalg.norm(estimate(copies[:, 0], copies[:, 1]), axis=-1).mean())
    return figures


def dis_flow(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
    """OpenCV's DIS (medium) on the same frames resized to 128 pixels, flow (N, H, W, 2) in their own pixels."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = []
    for a, b in zip(first, second):
        factor = RAFT_SIDE / a.shape[1]
        grey = [cv2.cvtColor(cv2.resize(i, None, fx=factor, fy=factor), cv2.COLOR_RGB2GRAY) for i in (a, b)]
        flow = dis.calc(grey[0], grey[1], None)  # type: ignore[call-overload]
        flows.append(cv2.resize(flow, a.shape[1::-1], interpolation=cv2.INTER_AREA) / factor)
    return np.stack(flows)


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train the flow network and write ``out`` (model.safetensors in float16, config.json).

    Args:
        out: folder to make.
        work: folder for checkpoints; a training that was interrupted goes on from there.
        device: `auto`, `cpu` or `cuda`.
        steps: optimizer steps of 6 pairs of frames.

    Returns:
        The figures of `measure`.
    """
    torch.manual_seed(0)
    where = choose_device(device)
    model = raft_small(weights=None).to(where)
    pool = clip_pool(2500, seed=51, with_flow=True)
    ema = Ema(model, 0.99)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        first, second, target, weight = (t.to(where) for t in training_pairs(pool, BATCH, rng))
        with autocast(where):
            flows = model(first, second, num_flow_updates=UPDATES)
        # Most pixels stand still; those that move would count for little without a weight of their own.
        emphasis = weight * (1 + 2 * (torch.linalg.norm(target, dim=1) > 0.5 * RAFT_SIDE / FRAME_SIDE))
        loss = torch.zeros((), device=where)
        for index, flow in enumerate(flows):
            distance = (flow.float() - target).abs().sum(1)
            loss = loss + 0.8 ** (len(flows) - index - 1) * (distance * emphasis).sum() / emphasis.sum()
        error = torch.linalg.norm(flows[-1].detach().float() - target, dim=1)
        return {"loss": loss, "epe": (error * weight).sum() / weight.sum() * FRAME_SIDE / RAFT_SIDE}

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-5)
    model.train()
    train_loop("motion", model, optimizer, step_function, steps=steps or STEPS, folder=work, ema=ema)
    ema.copy_to(model)
    export(model, out)
    return measure(out)


def export(model: nn.Module, out: Path) -> None:
    """Write the folder that `magicid.rewards.dynamics` loads."""
    with written_whole(out) as temporary:
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, str(temporary / "model.safetensors"))
        config = {"architecture": "raft_small", "num_flow_updates": UPDATES}
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
