"""Trains the small Qwen2-VL that rates how well a clip follows its prompt.

It answers the same question, through the same chat template, that a large vision-language model is asked in production;
the teacher is in `prompt_examples`, and the loss is on the answer tokens. So small a model needs help: linear heads,
thrown away afterwards, have to read the pose of the person's head from the vision tower (which first learns that
alone), its change from the language model's states along the video, action and place at the video's end, what is shown
and what is asked from the middle layer before the answer, and whether the two agree from the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration

from magicid.rewards.semantics import RATING_QUESTION
from magicid.world.clip_pool import clip_pool
from magicid.world.degradation import degrade, fold_frames, unfold_frames
from magicid.world.language import ACTIONS, PLACES, STILL, caption
from magicid.world.prompt_batches import IGNORE, PackedEncoder, vision_features
from magicid.world.prompt_examples import (
    POSE_SPREAD,
    STILL_CLASS,
    Examples,
    draw_examples,
    other_than,
    question,
)
from magicid.world.prompt_model import make_model, make_processor
from magicid.world.training_loop import Ema, autocast, choose_device, load_checkpoint, train_loop, written_whole

STEPS = 1700
BATCH = 20
VISION_STEPS = 1300
VISION_BATCH = 24
TOKENS_PER_TIME = 9


class _WithHead(nn.Module):
    """The model and the heads that help it in training."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width, poses = model.lm_head.in_features, len(POSE_SPREAD)
        self.named = nn.Linear(width, STILL_CLASS + 1 + len(PLACES))
        self.pose = nn.Linear(TOKENS_PER_TIME * width, 2 * poses)
        self.change = nn.Linear(width, poses)
        self.place = nn.Linear(width, len(PLACES))
        self.shown = nn.Linear(width, STILL_CLASS + 1 + len(PLACES))
        self.asked = nn.Linear(width, STILL_CLASS + 1 + len(PLACES))
        self.agree = nn.Linear(width, 2)


def _paired(pose: NDArray[np.float32], device: torch.device) -> Tensor:
    """Poses (B, F, K) as (B, t, 2, K): two frames at a time, the last one twice as in the processor."""
    return torch.from_numpy(pose[:, [*range(pose.shape[1]), -1]]).unflatten(1, (-1, 2)).to(device)


def vision_loss(
    module: _WithHead, encode: PackedEncoder, examples: Examples, device: torch.device
) -> dict[str, Tensor]:
    """What the vision tower's features alone say about pose and place."""
    with _plain_attention(device):
        features = vision_features(module.model, encode.pixels(examples.frames).to(device), encode.grid)
        features = features.view(len(examples.frames), encode.grid[0], TOKENS_PER_TIME, -1)
        seen, where = module.pose(features.flatten(2)), module.place(features.mean((1, 2)))
    pose = F.smooth_l1_loss(seen.float(), _paired(examples.pose, device).flatten(2))
    place = F.cross_entropy(where.float(), torch.from_numpy(examples.places).to(device))
    return {"loss": pose + 0.1 * place, "pose": pose, "place": place}


@contextmanager
def _plain_attention(device: torch.device) -> Iterator[None]:
    """bfloat16 autocast, on a CPU without the fused attention, whose backward pass is slow there."""
    with autocast(device), sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
        yield


def training_loss(
    module: _WithHead, encode: PackedEncoder, examples: Examples, device: torch.device
) -> dict[str, Tensor]:
    """Cross entropy of the answers, and what the helping heads get wrong."""
    inputs, labels = encode(examples.frames, examples.texts, examples.answers)
    inputs, labels = {k: v.to(device) for k, v in inputs.items()}, labels.to(device)
    said = labels != IGNORE
    before = said[:, 1:] & ~said[:, :-1]  # the last token of each question
    with _plain_attention(device):
        states = encode.states(module.model, inputs)
        hidden = states.last[:, :-1]
        logits = module.model.lm_head(hidden[said[:, 1:]])
        named = module.named(states.last[inputs["input_ids"] == module.model.config.vision_end_token_id])
        seen = module.pose(states.video.flatten(2))
        changed = module.change(encode.by_time(states.last, inputs["input_ids"]))
        middle = F.layer_norm(states.middle[:, :-1][before], states.middle.shape[-1:])
        shown, asked, agree = module.shown(middle), module.asked(middle), module.agree(hidden[before])
    actions = torch.from_numpy(np.where(examples.actions == STILL, STILL_CLASS, examples.actions)).to(device)
    truth = torch.stack([actions, torch.from_numpy(examples.places).to(device)], 1)
    wanted = torch.from_numpy(examples.asked).to(device)
    repeated = truth[:, None].expand_as(wanted)
    rated = wanted[..., 0].flatten() != IGNORE
    same = (wanted == repeated).flatten(0, 1)[rated].float()
    pairs = _paired(examples.pose, device)
    parts = {
        "answer": F.cross_entropy(logits.float(), labels[:, 1:][said[:, 1:]]),
        "video": _named_loss(named, truth),
        "pose": F.smooth_l1_loss(seen.float(), pairs.flatten(2)),
        "change": F.smooth_l1_loss(changed.float(), pairs.mean(2).diff(dim=1, prepend=pairs[:, :1].mean(2))),
        "shown": _named_loss(shown, repeated.flatten(0, 1)),
        "asked": _named_loss(asked, wanted.flatten(0, 1)),
        "agree": F.binary_cross_entropy_with_logits(agree[rated].float(), same),
    }
    helping = 0.3 * parts["video"] + 2 * (parts["pose"] + parts["change"]) + 0.3 * (parts["shown"] + parts["asked"])
    return {"loss": parts["answer"] + helping + parts["agree"], **parts}


def _named_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy of actions and places (N, 9 + 8) against their indices (N, 2)."""
    action, place = logits.float().split([STILL_CLASS + 1, len(PLACES)], dim=-1)
    return F.cross_entropy(action, truth[:, 0]) + F.cross_entropy(place, truth[:, 1])


@torch.no_grad()
def expected_ratings(
    model: Qwen2VLForConditionalGeneration, encode: PackedEncoder, frames: NDArray[np.uint8], prompts: list[list[str]],
    batch: int = 16,
) -> NDArray[np.float64]:  # fmt: skip
    """Expected ratings (B, Q) in 1..10 of clips (B, F, H, W, 3) for Q prompts each, from the probabilities of 1..10."""
    digits = [int(encode.tokenizer.convert_tokens_to_ids(str(d))) for d in range(10)]
    results = []
    for start in range(0, len(prompts), batch):
        texts = [[question(p) for p in asked] for asked in prompts[start : start + batch]]
        inputs, labels = encode(frames[start : start + batch], texts, [["1"] * len(asked) for asked in texts])
        logits = model.lm_head(encode.states(model, inputs).last).double()
        rows, columns = torch.nonzero((labels != IGNORE) & (labels != encode.end), as_tuple=True)  # the places of "1"
        first = logits[rows, columns - 1].softmax(-1)[:, digits].numpy()
        zero = logits[rows, columns].softmax(-1)[:, digits[:1]].numpy()
        ten = np.concatenate([first[:, 1:2] * (1 - zero), first[:, 2:], first[:, 1:2] * zero], 1)
        results.append(((ten * np.arange(1, 11)).sum(1) / ten.sum(1)).reshape(len(texts), -1))
    return np.concatenate(results)


def area_under_curve(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> float:
    """Probability that a rating from ``right`` is above one from ``wrong`` (ties count half)."""
    difference = right[:, None] - wrong[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def measure(folder: Path, clips: int = 240, seed: int = 950_000) -> dict[str, float]:
    """AUC of right against wrong prompts on clips of unseen people, loaded from the folder as production does.

    Keys: `auc_action`, `auc_place`, `auc_both` (what is wrong), `auc_still` (right clips against photos held still with
    the same prompt), `auc_degraded` (all three wrongs on degraded clips), and mean ratings `right`, `wrong_action`,
    `wrong_place`, `wrong_both`, `still`.
    """
    encode = PackedEncoder(AutoProcessor.from_pretrained(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    pool = clip_pool(clips, seed)
    rng = np.random.default_rng(seed)
    names = ("right", "wrong_action", "wrong_place", "wrong_both")
    prompts = []
    for action, place in zip(pool.actions.tolist(), pool.places.tolist()):
        other = other_than(action, len(ACTIONS), rng), other_than(place, len(PLACES), rng)
        prompts.append([caption(*pair) for pair in ((action, place), (other[0], place), (action, other[1]), other)])
    table = expected_ratings(model, encode, pool.frames, prompts)
    ratings = dict(zip(names, table.T))
    held = np.repeat(pool.frames[:, 6:7], pool.frames.shape[1], axis=1)
    ratings["still"] = expected_ratings(model, encode, held, [p[:1] for p in prompts])[:, 0]
    figures = {
        f"auc_{name.removeprefix('wrong_')}": area_under_curve(ratings["right"], values)
        for name, values in ratings.items()
        if name != "right"
    }
    degraded = unfold_frames(degrade(fold_frames(pool.frames), rng))
    bad = expected_ratings(model, encode, degraded, prompts)
    figures["auc_degraded"] = area_under_curve(bad[:, 0], bad[:, 1:].ravel())
    return figures | {name: float(values.mean()) for name, values in ratings.items()}


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train the rating model and write ``out``, a folder for AutoProcessor and AutoModelForImageTextToText.

    Args:
        out: folder to make.
        work: folder for checkpoints; a training that was interrupted goes on from there.
        device: `auto`, `cpu` or `cuda`.
        steps: optimizer steps of 20 clips with three questions each.

    Returns:
        The figures of `measure`.
    """
    torch.manual_seed(0)
    where = choose_device(device)
    processor = make_processor(RATING_QUESTION)
    module = _WithHead(make_model(processor.tokenizer)).to(where)
    encode = PackedEncoder(processor)
    pool = clip_pool(5000, seed=61)
    total = steps or STEPS

    def vision_step(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        return vision_loss(module, encode, draw_examples(pool, VISION_BATCH, rng, amount=0.6), where)

    module.train()
    tower = [*module.model.model.visual.parameters(), *module.pose.parameters(), *module.place.parameters()]
    optimizer = torch.optim.AdamW(tower, lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    vision_steps = round(VISION_STEPS * min(1.0, total / STEPS))
    train_loop("prompt: vision", module, optimizer, vision_step, steps=vision_steps, folder=work / "vision", seed=1)
    load_checkpoint(work / "vision", module)
    ema = Ema(module, 0.99)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        return training_loss(module, encode, draw_examples(pool, BATCH, rng), where)

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.02, betas=(0.9, 0.98))
    train_loop("prompt", module, optimizer, step_function, steps=total, folder=work, ema=ema)
    ema.copy_to(module)
    with written_whole(out) as temporary:
        module.model.half().save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return measure(out)
