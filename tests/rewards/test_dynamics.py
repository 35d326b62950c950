"""The motion reward: torchvision's RAFT called directly, and a network whose flow is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import optical_flow

from magicid.errors import RewardError
from magicid.rewards.dynamics import MotionReward, mean_length
from tests.rewards.folders import motion_folder


class KnownFlow(nn.Module):
    """Flow (x, y) = (rise of the red mean, 6) px of the frames it is given; remembers their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, first, second, num_flow_updates):
        self.sizes.append(tuple(first.shape))
        rise = (second[:, 0].mean((1, 2)) - first[:, 0].mean((1, 2))) * 127.5
        flow = torch.full((len(first), 2, *first.shape[-2:]), 6.0)
        flow[:, 0] = rise[:, None, None]
        return [flow * 0, flow]


def reds(levels, height, width) -> np.ndarray:
    frames = np.zeros((len(levels), height, width, 3), np.uint8)
    frames[..., 0] = np.array(levels)[:, None, None]
    return frames


def test_flow_is_raft_of_consecutive_frames(tmp_path) -> None:
    model = MotionReward.from_pretrained(motion_folder(tmp_path / "motion"))
    frames = np.random.default_rng(0).integers(0, 256, (3, 128, 136, 3), dtype=np.uint8)
    raft = optical_flow.raft_small(weights=None).eval()
    raft.load_state_dict(load_file(str(tmp_path / "motion" / "model.safetensors")))
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = raft(images[:-1], images[1:], num_flow_updates=2)[-1].numpy()
    flow = model.flow(frames)
    assert flow.dtype == np.float32
    np.testing.assert_allclose(flow, expected, atol=1e-4)
    assert model.score(frames) == pytest.approx(np.sqrt(expected[:, 0] ** 2 + expected[:, 1] ** 2).mean(), rel=1e-4)


def test_half_precision_weights_are_read(tmp_path) -> None:
    folder = motion_folder(tmp_path / "motion", "raft_large")
    state = load_file(str(folder / "model.safetensors"))
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, str(folder / "model.safetensors"))
    model = MotionReward.from_pretrained(folder)
    assert isinstance(model.model, optical_flow.RAFT)
    assert model.updates == 2
    name, value = next((k, v) for k, v in half.items() if v.dtype == torch.float16)
    assert torch.equal(model.model.state_dict()[name], value.float())


def test_small_frames_are_resized_up_and_the_flow_scaled_back() -> None:
    network = KnownFlow()
    flow = MotionReward(network).flow(reds([0, 8, 24], 48, 48))
    assert network.sizes == [(2, 3, 128, 128)]
    assert flow.shape == (2, 2, 48, 48)
    np.testing.assert_allclose(flow[:, 1], 6 * 48 / 128, rtol=1e-5)
    np.testing.assert_allclose(flow[:, 0, 20, 20], [8 * 48 / 128, 16 * 48 / 128], rtol=1e-4)


def test_score_is_the_mean_length_in_px_per_frame() -> None:
    assert MotionReward(KnownFlow()).score(reds([10, 18], 64, 64)) == pytest.approx(np.hypot(8, 6) / 2, rel=1e-4)


@pytest.mark.parametrize(("window", "shaken"), [(1, 2.0), (2, 0.0), (3, 2 / 3), (4, 0.0), (9, 0.0)])
def test_what_goes_back_and_forth_cancels_out_in_a_window(window: int, shaken: float) -> None:
    back_and_forth = torch.tensor([2.0, -2.0, 2.0, -2.0]).view(1, 4, 1, 1, 1) * torch.tensor([1.0, 0.0]).view(2, 1, 1)
    steady = torch.tensor([3.0, 4.0]).view(1, 1, 2, 1, 1).expand(1, 4, 2, 1, 1)
    lengths = mean_length(torch.cat([back_and_forth, steady]).expand(2, 4, 2, 5, 6), window)
    assert lengths.tolist() == pytest.approx([shaken, 5.0])


def test_many_clips_score_as_each_alone_under_a_window() -> None:
    reward = MotionReward(KnownFlow(), window=2)
    clips = np.stack([reds([0, 8, 24, 8], 48, 48), reds([8, 0, 8, 0], 48, 48)])
    assert reward.score_many(clips) == pytest.approx([reward.score(clip) for clip in clips])
    assert reward.score(clips[0]) < MotionReward(KnownFlow()).score(clips[0])


def test_odd_sizes_are_padded_to_the_grid_and_cut_again() -> None:
    network = KnownFlow()
    flow = MotionReward(network).flow(reds([0, 8], 40, 72))  # 128 x 230 for the network, padded to 128 x 232
    assert network.sizes == [(1, 3, 128, 232)]
    np.testing.assert_allclose(flow[0, 0], 8 * 72 / 230, rtol=1e-4)
    np.testing.assert_allclose(flow[0, 1], 6 * 40 / 128, rtol=1e-4)
    large = MotionReward(network).flow(reds([0, 8], 130, 140))
    assert large.shape == (1, 2, 130, 140)
    np.testing.assert_allclose(large[0, 1], 6, rtol=1e-6)


def test_long_clips_run_in_parts_without_losing_a_pair() -> None:
    network = KnownFlow()
    levels = np.arange(21) ** 2 // 2
    flow = MotionReward(network).flow(reds(levels, 128, 128))
    assert [size[0] for size in network.sizes] == [16, 4]
    np.testing.assert_allclose(flow[:, 0, 0, 0], np.diff(levels), atol=1e-3)


def test_a_single_frame_has_no_motion_reward() -> None:
    with pytest.raises(RewardError, match="1 frames"):
        MotionReward(KnownFlow()).score(reds([0], 16, 16))


def test_non_finite_flow_is_an_error_not_a_number() -> None:
    class Broken(KnownFlow):
        def forward(self, first, second, num_flow_updates):
            return [super().forward(first, second, num_flow_updates)[-1] * float("nan")]

    with pytest.raises(RewardError, match="non-finite"):
        MotionReward(Broken()).score(reds([0, 1], 128, 128))


@pytest.mark.parametrize("problem", ["no folder", "architecture", "weights"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, problem) -> None:
    folder = tmp_path / "motion"
    if problem != "no folder":
        motion_folder(folder)
    if problem == "architecture":
        (folder / "config.json").write_text(json.dumps({"architecture": "pwc"}))
    if problem == "weights":
        (folder / "config.json").write_text(json.dumps({"architecture": "raft_large"}))
    with pytest.raises(RewardError, match="cannot load the motion model"):
        MotionReward.from_pretrained(folder)
