"""The classifier that only measures: which action and which place does a clip show?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> nn.Sequential:
    padding = tuple(k // 2 for k in kernel)
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False),  # type: ignore[arg-type]
        nn.BatchNorm3d(outputs),
        nn.ReLU(inplace=True),
    )


class ActionPlaceClassifier(nn.Module):
    """A small 3D convolutional network over clips of 13 frames of 48 x 48 pixels.

    Args:
        actions: number of actions.
        places: number of places.
        width: channels of the first layer.
    """

    def __init__(self, actions: int = 8, places: int = 8, width: int = 24) -> None:
        super().__init__()
        self.config = {"architecture": "action_place_3d", "actions": actions, "places": places, "width": width}
        self.trunk = nn.Sequential(
            _conv(3, width, (3, 5, 5), (1, 2, 2)),
            _conv(width, 2 * width, (3, 3, 3), (1, 2, 2)),
            _conv(2 * width, 3 * width, (3, 3, 3), (2, 2, 2)),
            _conv(3 * width, 4 * width, (3, 3, 3), (2, 1, 1)),
        )
        self.dropout = nn.Dropout(0.2)
        # Where and when a feature fires matters for the action, so the grid (2 x 3 x 3 over 4 x 6 x 6) is kept.
        self.pool = nn.AdaptiveAvgPool3d((4, 3, 3))
        self.action = nn.Linear(4 * width * 36, actions)
        self.place = nn.Linear(4 * width, places)

    def forward(self, clips_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Clips (B, 3, F, H, W) in -1..1 to logits of the actions (B, 8) and of the places (B, 8)."""
        features = self.dropout(self.trunk(clips_BCFHW))
        return self.action(self.pool(features).flatten(1)), self.place(features.mean((2, 3, 4)))

    @torch.no_grad()
    def predict(
        self, frames_BFHWC: NDArray[np.uint8], batch: int = 32
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Probabilities of the actions (B, 8) and of the places (B, 8), in the order of `magicid.world.language`.

        Args:
            frames_BFHWC: uint8 RGB clips (B, F, H, W, 3).
            batch: clips per forward pass.
        """
        self.eval()
        device = next(self.parameters()).device
        actions, places = [], []
        for start in range(0, len(frames_BFHWC), batch):
            action, place = self(to_input(frames_BFHWC[start : start + batch]).to(device))
            actions.append(action.softmax(-1).cpu().numpy())
            places.append(place.softmax(-1).cpu().numpy())
        return np.concatenate(actions), np.concatenate(places)

    def save_pretrained(self, folder: Path) -> None:
        """Write model.safetensors (float16) and config.json into ``folder``."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> ActionPlaceClassifier:
        """Load the folder that `save_pretrained` wrote. Raises FileNotFoundError when a file is missing."""
        folder = Path(folder)
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        model = cls(config["actions"], config["places"], config["width"])
        model.load_state_dict(load_file(str(folder / "model.safetensors")))
        return model.to(device).eval()


def to_input(frames_BFHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 clips (B, F, H, W, 3) to float32 (B, 3, F, H, W) in -1..1."""
    clips = torch.from_numpy(np.ascontiguousarray(frames_BFHWC)).permute(0, 4, 1, 2, 3).contiguous()
    return clips.float().div(127.5).sub(1)
