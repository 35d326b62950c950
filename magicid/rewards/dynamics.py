"""R_dy: how much moves, by RAFT's optical flow between consecutive frames.

Source: MagicID, the dynamics reward; Teed and Deng, RAFT, ECCV 2020, arXiv:2003.12039 (torchvision's implementation).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from magicid.errors import RewardError
from magicid.rewards.frames import checked_frames

SHORTEST_SIDE = 128  # px: RAFT's correlation pyramid has four levels on a grid of one eighth
GRID = 8
_CORRELATION_VALUES = 1 << 28  # of one forward pass, 1 GiB in float32


class MotionReward:
    """RAFT. Make it with `from_pretrained`.

    Args:
        model: torchvision's `raft_small` or `raft_large`.
        updates: refinement steps.
        window: pairs of frames whose flow is averaged, pixel by pixel, before its length is taken. 1 is the paper's
            R_dy, which a shaking picture earns too; what goes back and forth within a window cancels out.
    """

    def __init__(self, model: nn.Module, updates: int = 12, window: int = 1) -> None:
        self.model = model.eval()
        self.updates, self.window = updates, window

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu", window: int = 1) -> MotionReward:
        """Load a folder with `model.safetensors` (torchvision's names, any float type) and `config.json`.

        The configuration names the `architecture`, raft_small or raft_large, and may give `num_flow_updates` (12).

        Raises:
            RewardError: a missing file, an unknown architecture, or weights that do not fit it.
        """
        from torchvision.models import optical_flow

        folder = Path(folder)
        action = "put config.json and model.safetensors of raft_small or raft_large there"
        try:
            config = json.loads((folder / "config.json").read_text())
            name = config.get("architecture", config.get("model"))
            if name not in ("raft_small", "raft_large"):
                raise ValueError(f"architecture {name!r} is not raft_small or raft_large")
            model = getattr(optical_flow, name)(weights=None)
            state = load_file(str(folder / "model.safetensors"))
            model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        except Exception as error:
            raise RewardError(f"cannot load the motion model {folder}: {error}", action) from error
        return cls(model.to(device), int(config.get("num_flow_updates", 12)), window)

    @torch.no_grad()
    def flow(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Optical flow float32 (F-1, 2, H, W) from each frame to the next: x and y in px of the given frames.

        Frames with a shorter side below 128 px are resized up for the network, and the flow is scaled back.

        Args:
            frames: uint8 RGB (F, H, W, 3), at least two.

        Raises:
            RewardError: frames of another form, or a network that fails or answers with non-finite numbers.
        """
        frames = checked_frames(frames, least=2)
        height, width = frames.shape[1:3]
        device = next(self.model.parameters()).device
        images = _network_input(frames)
        cells = (images.shape[-2] // GRID) * (images.shape[-1] // GRID)
        batch = max(1, min(16, _CORRELATION_VALUES // cells**2))
        parts = []
        try:
            for start in range(0, len(images) - 1, batch):
                stop = min(start + batch, len(images) - 1)
                first, second = images[start:stop].to(device), images[start + 1 : stop + 1].to(device)
                flow = self.model(first, second, num_flow_updates=self.updates)[-1]
                parts.append(_original_size(flow.float(), height, width).cpu())
        except Exception as error:
            raise RewardError(f"RAFT failed: {error}", "check the model folder and the clip") from error
        result = torch.cat(parts).numpy()
        if not np.isfinite(result).all():
            raise RewardError("RAFT answered with non-finite flow", "check the model folder")
        return result

    def score(self, frames: NDArray[np.uint8]) -> float:
        """R_dy: the mean length of the flow over all pixels and pairs of consecutive frames, px per frame (>= 0).

        With a `window` of w, of the mean flow of every w pairs in a row; of all pairs of a shorter clip.
        """
        return float(mean_length(torch.from_numpy(self.flow(frames))[None], self.window)[0])

    @torch.no_grad()
    def score_many(self, clips_NFHWC: NDArray[np.uint8], batch: int = 32) -> list[float]:
        """`score` of clips of one size, `batch` clips in one pass: for a GPU that one small clip leaves idle."""
        clips, frames, height, width, _ = clips_NFHWC.shape
        device, scores = next(self.model.parameters()).device, []
        for start in range(0, clips, batch):
            part = clips_NFHWC[start : start + batch]
            images = _network_input(part.reshape(-1, height, width, 3)).to(device).unflatten(0, (len(part), frames))
            first, second = images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1)
            flow = self.model(first, second, num_flow_updates=self.updates)[-1]
            flow = _original_size(flow.float(), height, width).unflatten(0, (len(part), frames - 1))
            scores += mean_length(flow, self.window).tolist()
        return scores


def mean_length(flow: Tensor, window: int) -> Tensor:
    """Mean length float64 (N,) of flow (N, T, 2, H, W), averaged over every `window` consecutive pairs before."""
    window = min(window, flow.shape[1])
    averaged = flow.double()
    if window > 1:  # a window of 1 would copy a gigabyte of a large clip's flow for nothing
        averaged = averaged.unfold(1, window, 1).mean(-1)  # (N, T - window + 1, 2, H, W)
    return torch.linalg.norm(averaged, dim=2).flatten(1).mean(1)


def _scale(height: int, width: int) -> float:
    return max(1.0, SHORTEST_SIDE / min(height, width))


def _resized(height: int, width: int) -> tuple[int, int]:
    scale = _scale(height, width)
    return round(height * scale), round(width * scale)


def _network_input(frames: NDArray[np.uint8]) -> Tensor:
    """(F, 3, h, w) in -1..1: at least 128 px a side, the last rows and columns repeated up to a multiple of 8."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    height, width = _resized(*frames.shape[1:3])
    if (height, width) != frames.shape[1:3]:
        images = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
    return F.pad(images, (0, -width % GRID, 0, -height % GRID), mode="replicate")


def _original_size(flow: Tensor, height: int, width: int) -> Tensor:
    """Flow (N, 2, h, w) of the network's frames as flow (N, 2, H, W) of the original ones, in their pixels."""
    resized_height, resized_width = _resized(height, width)
    flow = flow[..., :resized_height, :resized_width]
    if (resized_height, resized_width) == (height, width):
        return flow
    flow = F.interpolate(flow, size=(height, width), mode="area")
    return flow / flow.new_tensor([resized_width / width, resized_height / height]).view(1, 2, 1, 1)
