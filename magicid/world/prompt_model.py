"""The small Qwen2-VL of the face world: its tokenizer, processor, chat template and untrained model."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from magicid.world.language import ACTIONS, CLASS_WORDS, PLACES, VARIANTS, caption, vocabulary

SIZE = 48
FRAMES = 13
PATCH, MERGE, TEMPORAL = 8, 2, 2
DESCRIBE = "Describe the video."
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen2-VL's own template without its default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(rating_question: str) -> Qwen2Tokenizer:
    """A byte-level BPE as Qwen2's, learned from the closed language: every known word is one token, other text falls
    back to bytes, and digits are single characters, so that "10" is two tokens as in the real one."""
    blank: Any = Qwen2Tokenizer()._tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer, learner.decoder = (
        blank.normalizer,
        blank.pre_tokenizer,
        decoders.ByteLevel(),
    )
    captions = [
        caption(action, place, class_word=word, variant=variant)
        for action in (None, *range(len(ACTIONS)))
        for place in range(len(PLACES))
        for word in CLASS_WORDS
        for variant in range(VARIANTS)
    ]
    words = [form for word in vocabulary() for form in (word, f" {word}", f'"{word}')]
    texts = [*captions, *words, rating_question.format(prompt=""), DESCRIBE, "user\n", "assistant\n", "system\n"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, eos_token="<|im_end|>", model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def make_processor(rating_question: str) -> Qwen2VLProcessor:
    """A processor that keeps clips of 48 x 48 pixels as they are and uses every frame."""
    shared: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL}
    size: dict[str, Any] = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    norm: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **norm, **shared),
        tokenizer=make_tokenizer(rating_question),
        video_processor=Qwen2VLVideoProcessor(
            size=size, do_sample_frames=False, cap_pixels_per_frame=False, **norm, **shared
        ),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """The untrained network, about 1.8 million parameters."""
    width = 160

    def token(name: str) -> int:
        return int(tokenizer.get_vocab()[name])

    config = Qwen2VLConfig(
        vision_config={
            "depth": 3, "embed_dim": 96, "hidden_size": width, "num_heads": 4, "mlp_ratio": 3, "patch_size": PATCH,
            "spatial_merge_size": MERGE, "temporal_patch_size": TEMPORAL,
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 400, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 6, 6]},
            "bos_token_id": None, "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)
