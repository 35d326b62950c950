"""Fast training batches for the Qwen2-VL of the face world: several questions about one clip in one sequence.

All questions see the clip and none sees another one, and each begins at the same position, so the answers are those
that separate conversations would get (a test compares the two). The vision tower attends within one pair of frames;
here all pairs of the batch go through it as one batch instead of one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half
from transformers.vision_utils import get_vision_position_ids

IGNORE = -100
VISION_END = "<|vision_end|>"


def vision_features(model: Qwen2VLForConditionalGeneration, pixels: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Merged features (tokens, D) of patches (N, patch values) of clips that all have the same grid (t, h, w)."""
    visual = model.model.visual
    _, height, width = grid
    places = get_vision_position_ids(
        torch.tensor([[1, height, width]], device=pixels.device), visual.spatial_merge_size
    )
    hidden = F.linear(pixels, visual.patch_embed.proj.weight.flatten(1))
    hidden = hidden.view(-1, height * width, hidden.shape[-1])
    cos, sin = (t[None, None] for t in visual.rotary_pos_emb(hidden, places))
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = (t * cos.to(t.dtype) + rotate_half(t) * sin.to(t.dtype) for t in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        hidden = hidden + attention.proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.flatten(0, 1))


@dataclass(frozen=True)
class States:
    """What the model holds: last and middle layer (B, T, D), and the vision tower's features (B, t, tokens, D)."""

    last: Tensor
    middle: Tensor
    video: Tensor


class PackedEncoder:
    """Clips and, for each, the same number of (text, answer) pairs to model inputs.

    Args:
        processor: the processor of the model folder.
        grid: patches of a clip in time, height and width.
    """

    def __init__(self, processor: Qwen2VLProcessor, grid: tuple[int, int, int] = (7, 6, 6)) -> None:
        self.processor, self.tokenizer, self.grid = processor, processor.tokenizer, grid
        merge = processor.video_processor.merge_size
        self.video_tokens = grid[0] * grid[1] * grid[2] // merge**2
        self.merged = (grid[0], grid[1] // merge, grid[2] // merge)
        self._texts: dict[str, tuple[list[int], list[int]]] = {}
        self.end = int(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self.video = int(self.tokenizer.convert_tokens_to_ids("<|video_pad|>"))

    def conversation(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids up to the end of the video, and from there to the beginning of the answer."""
        if text not in self._texts:
            content: Any = [{"type": "video"}, {"type": "text", "text": text}]
            chat = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            before, after = chat.replace("<|video_pad|>", "<|video_pad|>" * self.video_tokens).split(VISION_END)
            self._texts[text] = (self.tokenizer(before + VISION_END)["input_ids"], self.tokenizer(after)["input_ids"])
        return self._texts[text]

    def _prefix_positions(self, length: int) -> Tensor:
        """M-RoPE positions (3, length) up to the end of the video; see Qwen2VLModel.get_rope_index."""
        start = length - self.video_tokens - 1
        times, rows, columns = self.merged
        grid = torch.stack(torch.meshgrid(*map(torch.arange, (times, rows, columns)), indexing="ij")).reshape(3, -1)
        lead = torch.arange(start).expand(3, -1)
        after = start + max(rows, columns)
        return torch.cat([lead, grid + start, torch.full((3, 1), after)], 1)

    def pixels(self, frames: NDArray[np.uint8]) -> Tensor:
        """Patches (N, values) of clips (B, F, H, W, 3), made by the folder's own video processor."""
        videos = [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in np.ascontiguousarray(frames)]
        return self.processor.video_processor(videos=videos, return_tensors="pt")["pixel_values_videos"]

    def __call__(
        self, frames: NDArray[np.uint8], texts: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs for `states` and labels (B, T), -100 everywhere but on the answers and their end marks."""
        prefix = self.conversation(texts[0][0])[0]
        base = self._prefix_positions(len(prefix))
        rows, labels, segments, positions = [], [], [], []
        for asked, given in zip(texts, answers):
            row, label, segment, place = list(prefix), [IGNORE] * len(prefix), [0] * len(prefix), [base]
            for number, (text, answer) in enumerate(zip(asked, given), 1):
                tail = self.conversation(text)[1]
                said = [*self.tokenizer(answer)["input_ids"], self.end]
                row += tail + said
                label += [IGNORE] * len(tail) + said
                segment += [number] * (len(tail) + len(said))
                place.append((base[0, -1] + 1 + torch.arange(len(tail) + len(said))).expand(3, -1))
            rows.append(row)
            labels.append(label)
            segments.append(segment)
            positions.append(torch.cat(place, 1))
        length = max(map(len, rows))

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([v + [fill] * (length - len(v)) for v in values])

        segment_ids = padded(segments, -1)
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        visible = (same | (segment_ids == 0)[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
        inputs = {
            "input_ids": padded(rows, self.tokenizer.pad_token_id),
            "attention_mask": visible[:, None],
            "position_ids": torch.stack([F.pad(p, (0, length - p.shape[1])) for p in positions], 1),
            "pixels": self.pixels(frames),
        }
        return inputs, padded(labels, IGNORE)

    def states(self, model: Qwen2VLForConditionalGeneration, inputs: dict[str, Tensor]) -> States:
        """Run the model on packed inputs."""
        features = vision_features(model, inputs["pixels"], self.grid)
        video = BaseModelOutputWithPooling(pooler_output=(features,))  # type: ignore[arg-type]
        outputs = model.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"], mm_encoder_outputs={"video": video}, use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
        middle = outputs.hidden_states[len(outputs.hidden_states) // 2]
        by_time = features.view(len(inputs["input_ids"]), self.grid[0], -1, features.shape[-1])
        return States(outputs.last_hidden_state, middle, by_time)

    def by_time(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Hidden states (B, t, D) at the last video token of each pair of frames."""
        video = hidden[input_ids == self.video].view(len(hidden), self.grid[0], -1, hidden.shape[-1])
        return video[:, :, -1]
