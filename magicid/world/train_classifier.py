"""Trains the (action, place) classifier that only measures.

One clip in eight is a frame held still, for which every action has to be equally likely: a clip without motion then
never counts as a recognised action at a probability above one half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from magicid.world.classifier import ActionPlaceClassifier, to_input
from magicid.world.clip_pool import clip_pool
from magicid.world.degradation import degrade, fold_frames, unfold_frames
from magicid.world.language import ACTIONS
from magicid.world.training_loop import Ema, autocast, choose_device, train_loop, written_whole

STEPS = 1000
BATCH = 32
HELD = 4


def measure(folder: Path, clips: int = 512, seed: int = 930_000) -> dict[str, float]:
    """Accuracy on renders of unseen people: `action`, `place`, and `action_degraded`, `place_degraded`.

    `still` is the mean highest probability of an action for frames held still; 1/8 would be ideal.
    """
    model = ActionPlaceClassifier.from_pretrained(folder)
    pool = clip_pool(clips, seed)
    degraded = unfold_frames(degrade(fold_frames(pool.frames), np.random.default_rng(seed)))
    figures = {}
    for suffix, frames in (("", pool.frames), ("_degraded", degraded)):
        action, place = model.predict(frames)
        figures[f"action{suffix}"] = float((action.argmax(1) == pool.actions).mean())
        figures[f"place{suffix}"] = float((place.argmax(1) == pool.places).mean())
    held = np.repeat(pool.frames[:64, 6:7], pool.frames.shape[1], axis=1)
    return figures | {"still": float(model.predict(held)[0].max(1).mean())}


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train the classifier and write ``out`` (model.safetensors, config.json).

    Args:
        out: folder to make.
        work: folder for checkpoints; a training that was interrupted goes on from there.
        device: `auto`, `cpu` or `cuda`.
        steps: optimizer steps of 32 clips.

    Returns:
        The figures of `measure`.
    """
    torch.manual_seed(0)
    where = choose_device(device)
    model = ActionPlaceClassifier().to(where, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    pool = clip_pool(6000, seed=41)
    ema = Ema(model, 0.99)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = rng.integers(0, len(pool.frames), BATCH)
        frames = pool.frames[rows].copy()
        target = np.eye(len(ACTIONS), dtype=np.float32)[pool.actions[rows]]
        frames[:HELD] = frames[:HELD, rng.integers(frames.shape[1]), None]
        target[:HELD] = 1 / len(ACTIONS)
        frames = unfold_frames(degrade(fold_frames(frames), rng))
        with autocast(where):
            action, place = model(to_input(frames).to(where, memory_format=torch.channels_last_3d))
        loss_action = F.cross_entropy(action.float(), torch.from_numpy(target).to(where))
        loss_place = F.cross_entropy(place.float(), torch.from_numpy(pool.places[rows]).long().to(where))
        return {"loss": loss_action + loss_place, "action": loss_action, "place": loss_place}

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    model.train()
    train_loop("classifier", model, optimizer, step_function, steps=steps or STEPS, folder=work, ema=ema)
    ema.copy_to(model)
    with written_whole(out) as temporary:
        model.save_pretrained(temporary)
    return measure(out)
