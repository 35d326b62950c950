"""The head's pose in a frame of the face world: a small network that only measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from magicid.world.face import HEAD
from magicid.world.motion_paths import PITCH, ROLL, SCALE, YAW, X, Y

SIDE = 48
TARGETS = ("x", "y", "yaw", "pitch", "roll", "log_scale")
# Means and spreads of the targets over renders, so that the network's outputs are of one size.
_MEAN = torch.tensor([0.5, 0.48, 0.0, 0.0, 0.0, 0.0])
_SPREAD = torch.tensor([0.08, 0.06, 0.4, 0.3, 0.15, 0.12])


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class HeadPose(nn.Module):
    """Frames (N, 3, 48, 48) in -1..1 to (N, 6): x, y in frame widths, yaw, pitch, roll in radians, log of the scale.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.config = {"architecture": "head_pose", "width": width}
        self.trunk = nn.Sequential(
            _conv(3, width, 5, 2),
            _conv(width, 2 * width, 3, 2),
            _conv(2 * width, 2 * width, 3, 1),
            _conv(2 * width, 4 * width, 3, 2),
        )
        self.narrow = _conv(4 * width, 32, 3, 1)
        self.head = nn.Sequential(nn.Linear(32 * 36, 128), nn.ReLU(inplace=True), nn.Linear(128, len(TARGETS)))

    def forward(self, frames: Tensor) -> Tensor:
        raw = self.head(self.narrow(self.trunk(frames)).flatten(1))
        return raw * _SPREAD.to(raw) + _MEAN.to(raw)

    @torch.no_grad()
    def poses(self, frames: NDArray[np.uint8], batch: int = 512) -> NDArray[np.float32]:
        """Poses (B, F, 6) of clips (B, F, H, W, 3) as `magicid.evaluation.metrics.pose` takes them."""
        self.eval()
        device = next(self.parameters()).device
        shape = frames.shape[:2]
        images = frames.reshape(-1, *frames.shape[2:])
        if images.shape[1:3] != (SIDE, SIDE):
            images = np.stack([cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images])
        parts = [self(to_input(images[i : i + batch]).to(device)).float().cpu() for i in range(0, len(images), batch)]
        return in_heads(torch.cat(parts).numpy().reshape(*shape, len(TARGETS)))

    def save_pretrained(self, folder: Path) -> None:
        """Write model.safetensors (float16) and config.json into ``folder``."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> HeadPose:
        """Load the folder that `save_pretrained` wrote. Raises FileNotFoundError when a file is missing."""
        folder = Path(folder)
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        model = cls(config["width"])
        model.load_state_dict(load_file(str(folder / "model.safetensors")))
        return model.to(device).eval()


def to_input(frames_NHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 frames (N, H, W, 3) to float32 (N, 3, H, W) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(frames_NHWC)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def targets(pose: NDArray[np.floating[Any]], size: int = SIDE) -> NDArray[np.float32]:
    """The network's targets (..., 6) from the renderer's true poses (..., K), whose x and y are in px."""
    columns = [pose[..., X] / size, pose[..., Y] / size, pose[..., YAW], pose[..., PITCH], pose[..., ROLL]]
    return np.stack([*columns, np.log(pose[..., SCALE])], -1).astype(np.float32)


def in_heads(found: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """(B, F, 6) with x and y in half head heights of the clip (its mean size) instead of frame widths."""
    unit = HEAD * np.exp(found[..., 5].mean(1, keepdims=True))[..., None]
    return np.concatenate([found[..., :2] / unit, found[..., 2:]], -1).astype(np.float32)
