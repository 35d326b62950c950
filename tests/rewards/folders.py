"""Tiny model folders of the production classes, whose answers can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

CANVAS = 64
LANDMARKS = np.array([[2, 3], [6, 3], [4, 5], [2, 6], [6, 6]], dtype=np.float32)  # of a face of 8 px, in px


def _constant(name: str, values) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(values)))


def detector(path: Path) -> None:
    """SCRFD's layout at 64 x 64: a red block of 8 px on the grid is a face, a green block of 16 px a larger one."""
    nodes, outputs = [_constant("pairs", np.int64([-1, 1])), _constant("scale", np.float32(40))], []
    nodes.append(_constant("half", np.float32(0.5)))
    for stride, channel in ((8, 0), (16, 1), (32, None)):
        cells = (CANVAS // stride) ** 2
        if channel is None:
            nodes.append(_constant(f"score_{stride}", np.zeros((2 * cells, 1), np.float32)))
        else:
            weight = np.zeros((2, 3, stride, stride), np.float32)
            weight[0, channel] = 1 / stride**2  # the mean of one channel; the second anchor stays silent
            weight[0, 1 - channel] = -1 / stride**2
            nodes += [
                _constant(f"weight_{stride}", weight),
                helper.make_node("Conv", ["input", f"weight_{stride}"], [f"mean_{stride}"], strides=[stride, stride]),
                helper.make_node("Sub", [f"mean_{stride}", "half"], [f"above_{stride}"]),
                helper.make_node("Mul", [f"above_{stride}", "scale"], [f"logit_{stride}"]),
                helper.make_node("Transpose", [f"logit_{stride}"], [f"last_{stride}"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"last_{stride}", "pairs"], [f"flat_{stride}"]),
                helper.make_node("Sigmoid", [f"flat_{stride}"], [f"score_{stride}"]),
            ]
        nodes.append(_constant(f"bbox_{stride}", np.tile(np.float32([[0, 0, 1, 1]]), (2 * cells, 1))))
        nodes.append(_constant(f"kps_{stride}", np.tile(LANDMARKS.reshape(1, 10) / 8, (2 * cells, 1))))
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        outputs += [
            helper.make_tensor_value_info(f"{kind}_{s}", TensorProto.FLOAT, [2 * (CANVAS // s) ** 2, width])
            for s in (8, 16, 32)
        ]
    _save(nodes, [1, 3, CANVAS, CANVAS], outputs, path)


def recogniser(path: Path, batch: int | str = "faces", scale: float = 1.0) -> None:
    """Embedding: `scale` times the mean of each channel over the quarters of the aligned crop (12 numbers)."""
    nodes = [
        helper.make_node("AveragePool", ["input"], ["quarters"], kernel_shape=[56, 56], strides=[56, 56]),
        helper.make_node("Flatten", ["quarters"], ["flat"]),
        _constant("scale", np.float32(scale)),
        helper.make_node("Mul", ["flat", "scale"], ["embedding"], name="scaling"),
    ]
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, 12])
    _save(nodes, [batch, 3, 112, 112], [output], path)


def _save(nodes, shape, outputs, path: Path) -> None:
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)], outputs
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def identity_folder(folder: Path, **more) -> Path:
    """An insightface folder."""
    folder.mkdir(parents=True)
    detector(folder / "detector.onnx")
    recogniser(folder / "recognizer.onnx", **more)
    return folder


def motion_folder(folder: Path, name: str = "raft_small") -> Path:
    """A RAFT of random weights."""
    from torchvision.models import optical_flow

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_file(getattr(optical_flow, name)(weights=None).state_dict(), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"architecture": name, "num_flow_updates": 2}))
    return folder


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def semantics_folder(folder: Path, ten_is_one_token: bool = False) -> Path:
    """A Qwen2.5-VL of random weights whose tokenizer knows single bytes, and "10" where asked."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    special.append("<|video_pad|>")
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if ten_is_one_token:
        tokenizer.add_tokens(["10"])
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 16 * 16, "longest_edge": 16 * 16}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, do_sample_frames=False, cap_pixels_per_frame=False, **patches),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 16,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "bos_token_id": None, "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"),
            "initializer_range": 0.5,
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder
