"""The two small text encoders of the face world's HunyuanVideo pipeline, with tokenizers that read any text.

The production pipeline conditions on every token of a Llama-type model (its third last hidden state) and on the pooled
output of a CLIP text model. Both are a few hundred thousand parameters here. Every word of the world's language is one
token, any other text falls back to letters and bytes. The encoders are trained for a minute to tell actions and places
apart, so that paraphrases of one caption come out close to each other, and then stay frozen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, LlamaTokenizerFast

from magicid.world import language
from magicid.world.training_loop import train_loop

WIDTH = 64
MAX_SEQUENCE_LENGTH = 20
PROMPT_TEMPLATE = {"template": "{}", "crop_start": 0}
CLASS_WORDS = ("person", "man", "woman")
BATCH = 128


@dataclass(frozen=True)
class PromptEmbeddings:
    """The transformer's condition: ``tokens`` (B, L, D), ``mask`` (B, L) 1 for real tokens, ``pooled`` (B, D)."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Tensor) -> PromptEmbeddings:
        return PromptEmbeddings(self.tokens[rows], self.mask[rows], self.pooled[rows])


def _merges(words: Sequence[str], suffix: str | None) -> list[Any]:
    """Byte-pair merges that join every word of ``words`` into one token, in the order in which they apply."""
    options: dict[str, Any] = {} if suffix is None else {"end_of_word_suffix": suffix}
    tokenizer = Tokenizer(BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=0, show_progress=False, **options)
    tokenizer.train_from_iterator(sorted(set(words)), trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _vocabulary(first: Sequence[str], merges: Sequence[Any]) -> dict[str, int]:
    tokens = dict.fromkeys([*first, *(left + right for left, right in merges)])
    return {token: i for i, token in enumerate(tokens)}


def llama_tokenizer(words: Sequence[str]) -> LlamaTokenizerFast:
    """A Llama tokenizer in which every word is one token and everything else becomes letters or bytes."""
    merges = _merges(["▁" + word for word in words], None)
    letters = [*(chr(c) for c in range(33, 127)), "▁"]
    first = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    return LlamaTokenizerFast(
        vocab=_vocabulary(first, merges), merges=merges, pad_token="<pad>", padding_side="right", add_bos_token=True
    )


def clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word is one token and everything else becomes bytes."""
    merges = _merges(words, "</w>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = ["<|startoftext|>", "<|endoftext|>", "<|pad|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab=_vocabulary(first, merges), merges=list(merges), pad_token="<|pad|>", model_max_length=77
    )


class TextEncoders(nn.Module):
    """Both encoders, and the linear readers of action and place that they are trained with."""

    def __init__(self, llama_tokens: LlamaTokenizerFast, clip_tokens: CLIPTokenizer) -> None:
        super().__init__()
        self.llama_tokens, self.clip_tokens = llama_tokens, clip_tokens
        # The pipeline takes the third last hidden state: with three layers, what the first one returns.
        self.llama = LlamaModel(
            LlamaConfig(
                vocab_size=len(llama_tokens), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=512, initializer_range=0.05,
                bos_token_id=llama_tokens.bos_token_id, eos_token_id=llama_tokens.eos_token_id,
                pad_token_id=llama_tokens.pad_token_id,
            )
        )  # fmt: skip
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokens), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
                num_attention_heads=4, projection_dim=WIDTH, max_position_embeddings=77, hidden_act="gelu",
                bos_token_id=clip_tokens.bos_token_id, eos_token_id=clip_tokens.eos_token_id,
                pad_token_id=clip_tokens.pad_token_id,
            )
        )  # fmt: skip
        # Word vectors of unit size: the transformer then tells words apart from its first step on.
        nn.init.normal_(self.llama.embed_tokens.weight, std=1.0)
        classes = len(language.ACTIONS) + len(language.PLACES) + 2
        self.read_tokens, self.read_pooled = nn.Linear(WIDTH, classes), nn.Linear(WIDTH, classes)

    def embed(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts exactly as the pipeline does with PROMPT_TEMPLATE and MAX_SEQUENCE_LENGTH."""
        device = self.read_pooled.weight.device
        texts = [PROMPT_TEMPLATE["template"].format(prompt) for prompt in prompts]  # type: ignore[attr-defined]
        llama = self.llama_tokens(
            texts, max_length=MAX_SEQUENCE_LENGTH, padding="max_length", truncation=True, return_tensors="pt"
        ).to(device)
        states = self.llama(
            input_ids=llama.input_ids, attention_mask=llama.attention_mask, output_hidden_states=True
        ).hidden_states
        clip = self.clip_tokens(list(prompts), padding="longest", max_length=77, truncation=True, return_tensors="pt")
        pooled = self.clip(clip.input_ids.to(device)).pooler_output
        return PromptEmbeddings(states[-3], llama.attention_mask.float(), pooled)

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the four pipeline folders text_encoder, text_encoder_2, tokenizer and tokenizer_2 under ``folder``."""
        for model, name in ((self.llama, "text_encoder"), (self.clip, "text_encoder_2")):
            stored: Any = copy.deepcopy(model)
            stored.to(dtype).save_pretrained(folder / name)
        self.llama_tokens.save_pretrained(folder / "tokenizer")
        self.clip_tokens.save_pretrained(folder / "tokenizer_2")


def sample_caption(rng: np.random.Generator, variants: int = 4) -> tuple[str, int, int]:
    """Draw a caption in any wording and with any class word, with its action and place."""
    action, place = int(rng.integers(len(language.ACTIONS))), int(rng.integers(len(language.PLACES)))
    text = language.caption(action, place, class_word=str(rng.choice(CLASS_WORDS)), variant=int(rng.integers(variants)))
    return text, action, place


def _training_prompt(rng: np.random.Generator) -> tuple[str, int, int]:
    """A caption or a piece of one, labelled with what it says (the last class of either kind: nothing)."""
    text, _, _ = sample_caption(rng)
    words = text.split()
    if rng.random() < 0.3:
        start, end = sorted(rng.integers(0, len(words) + 1, 2))
        text = " ".join(words[start:end])
    action, place = language.parse(text)
    nothing_said = (len(language.ACTIONS), len(language.PLACES))
    return text, nothing_said[0] if action is None else action, nothing_said[1] if place is None else place


def train_text_encoders(work: Path, device: str = "cpu", steps: int = 300) -> TextEncoders:
    """Build and lightly train both encoders, resuming from ``work``; they come back frozen, in evaluation mode."""
    torch.manual_seed(0)
    words = language.vocabulary()
    encoders = TextEncoders(llama_tokenizer(words), clip_tokenizer(words)).to(device)
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    actions = len(language.ACTIONS) + 1

    def step(_: int, rng: np.random.Generator) -> dict[str, Tensor]:
        texts, *labels = zip(*(_training_prompt(rng) for _ in range(BATCH)))
        action, place = (torch.tensor(column, device=device) for column in labels)
        embedded = encoders.embed(texts)
        mask = embedded.mask[..., None]
        mean = (embedded.tokens * mask).sum(1) / mask.sum(1)
        losses, hits = [], []
        for logits in (encoders.read_tokens(mean), encoders.read_pooled(embedded.pooled)):
            for part, label in ((logits[:, :actions], action), (logits[:, actions:], place)):
                losses.append(F.cross_entropy(part, label))
                hits.append((part.argmax(1) == label).float().mean())
        return {"loss": torch.stack(losses).sum(), "accuracy": torch.stack(hits).mean()}

    train_loop("text encoders", encoders, optimizer, step, steps=steps, folder=work / "text_encoders", log_every=100)
    return encoders.eval().requires_grad_(False)
