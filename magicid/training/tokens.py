"""MagicMe's baseline on any backbone: a few extended keyword tokens learn a person by self-reconstruction.

Ma et al., Magic-Me: Identity-Specific Video Customized Diffusion, 2024, arXiv:2402.09368: the base model stays as it
is, and extra tokens beside the class word are trained. Here they are vectors in the space that the transformer reads,
the text encoder's output, so that a trainer needs no text encoder; Magic-Me's segmentation of the photos is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from magicid import recipe
from magicid.backbones.base import TextEmbeddings, VideoBackbone, add_noise, stack_text, velocity_target
from magicid.errors import NonFiniteLossError, TrainingError
from magicid.training.loop import LogRow, TrainingResult, to_device
from magicid.training.loss import velocity_error
from magicid.training.pairs import draw
from magicid.training.sft import batch_of_step

TOKENS = "extended_tokens"  # the one tensor of such an adapter, (K, D)
_HIDDEN, _MASK = "encoder_hidden_states", "encoder_attention_mask"


def with_tokens(text: TextEmbeddings, tokens: Tensor) -> TextEmbeddings:
    """Text embeddings of B prompts with K tokens before each: before, because padding comes last.

    Args:
        text: `encoder_hidden_states` (B, L, D), and where the model has one `encoder_attention_mask` (B, L).
        tokens: (K, D).

    Raises:
        TrainingError: tokens of another width.
    """
    hidden = text[_HIDDEN]
    if tokens.ndim != 2 or tokens.shape[1] != hidden.shape[-1]:
        raise TrainingError(
            f"extended tokens of shape {tuple(tokens.shape)} do not fit text embeddings of width {hidden.shape[-1]}",
            "use tokens that were trained on this base model",
        )
    extra = tokens.to(hidden).expand(len(hidden), -1, -1)
    found = {**text, _HIDDEN: torch.cat([extra, hidden], dim=1)}
    if _MASK in text:
        found[_MASK] = torch.cat([text[_MASK].new_ones(len(hidden), len(tokens)), text[_MASK]], dim=1)
    return found


def first_tokens(text: TextEmbeddings, count: int, seed: int) -> Tensor:
    """Where training begins (K, D): the mean of the caption's own tokens, with a tenth of their spread as noise."""
    hidden = text[_HIDDEN][0].float()
    if _MASK in text:
        hidden = hidden[text[_MASK][0].bool()]
    spread = hidden.std(0, unbiased=False)
    noise = torch.randn(count, hidden.shape[-1], generator=torch.Generator().manual_seed(seed))
    return hidden.mean(0).cpu() + 0.1 * spread.cpu() * noise


def train_tokens(
    backbone: VideoBackbone,
    clips: Mapping[str, Tensor],
    texts: Mapping[str, TextEmbeddings],
    settings: recipe.Sft,
    trainer: recipe.Trainer,
    *,
    device: str | torch.device = "cpu",
    on_log: Callable[[LogRow], None] = lambda row: None,
    on_step: Callable[[int], None] = lambda step: None,
    on_tokens: Callable[[int, Tensor], None] = lambda step, tokens: None,
) -> TrainingResult:
    """Train `settings.tokens` tokens on inflated photos; the transformer, its adapters inactive, does not change.

    Draws and batches are those of SFT under the same settings. Every worker of a slot does the same work.

    Args:
        clips: clip id -> latents (C, F, H, W).
        texts: clip id -> embeddings of its caption, batch dimension 1.
        on_tokens: called after each step with the tokens as they are.

    Returns:
        `lora_state` holds the one tensor `TOKENS`, float32 on the CPU.

    Raises:
        NonFiniteLossError: the loss is not finite.
        TrainingError: no clips.
    """
    if not clips:
        raise TrainingError("there are no photo clips to train on", "check the identity's photos")
    tokens = first_tokens(texts[next(iter(clips))], settings.tokens, settings.seed).to(device).requires_grad_()
    optimizer = torch.optim.AdamW([tokens], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    history: list[LogRow] = []
    for step in range(settings.steps):
        began = time.perf_counter()
        visits = batch_of_step(list(clips), settings, step)
        clean = torch.stack([clips[visit.pair_id].float() for visit in visits]).to(device)
        draws = [draw(settings.seed, v.pair_id, v.number, clean.shape[1:], trainer.shift) for v in visits]
        noise, sigma = (torch.stack([getattr(d, name) for d in draws]).to(device) for name in ("noise", "sigma"))
        text = to_device(stack_text([texts[visit.pair_id] for visit in visits]), tokens.device)
        velocity = backbone.predict_velocity(
            add_noise(clean, noise, sigma), sigma, with_tokens(text, tokens), settings.guidance_scale
        )
        loss = velocity_error(velocity, velocity_target(clean, noise)).mean()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLossError(f"the loss is not finite at step {step}", "lower sft.learning_rate")
        (tokens.grad,) = torch.autograd.grad(loss, [tokens])
        norm = float(torch.nn.utils.clip_grad_norm_([tokens], 1.0))
        optimizer.step()
        if (step + 1) % trainer.log_every == 0 or step + 1 == settings.steps:
            speed = 1 / (time.perf_counter() - began)
            history.append(
                {"step": step + 1.0, "loss": float(loss.detach()), "gradient_norm": norm, "steps_per_second": speed}
            )
            on_log(history[-1])
        on_tokens(step + 1, tokens.detach())
        on_step(step + 1)
    return TrainingResult({TOKENS: tokens.detach().float().cpu()}, settings.steps, history)
