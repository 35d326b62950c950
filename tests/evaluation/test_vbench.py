"""VBench's own package, where it is installed, against what is written from its definition."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from magicid.errors import RewardError
from magicid.evaluation.metrics.motion import is_dynamic, thinned, top_magnitudes
from magicid.evaluation.metrics.sample import Sample
from magicid.evaluation.metrics.vbench import INSTALL, VBenchMetrics
from magicid.world.renderer import render_clips, sample_people


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vbench.dynamic_degree", None)
    with pytest.raises(RewardError, match="needs the vbench package") as told:
        VBenchMetrics.from_pretrained(tmp_path / "raft-things.pth")
    assert told.value.action == INSTALL


@pytest.mark.filterwarnings("ignore:::vbench", "ignore:torch.meshgrid")
@pytest.mark.parametrize(("strength", "verdict"), [(1.0, 1.0), (0.2, 0.0)])
def test_its_verdict_is_ours_on_its_own_flow(tmp_path: Path, strength: float, verdict: float) -> None:
    """The weights are random: the flow is nonsense, large or small, and both must judge the same nonsense alike."""
    raft = pytest.importorskip(
        "vbench.third_party.RAFT.core.raft", reason=f"VBench is not installed: {INSTALL}", exc_type=ImportError
    )
    import torch
    from easydict import EasyDict

    torch.manual_seed(0)
    network = raft.RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False)).eval()
    with torch.no_grad():
        for parameter in network.update_block.flow_head.conv2.parameters():
            parameter *= strength
    file = tmp_path / "raft-things.pth"
    torch.save({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, file)
    metric = VBenchMetrics.from_pretrained(file)

    frames = render_clips(sample_people(2, 77), [0, 3], [0, 1], [1, 2]).frames[:, :9]
    clips = frames.repeat(4, axis=2).repeat(4, axis=3)  # RAFT needs 128 px
    samples = [Sample(clip, fps) for clip in clips for fps in (8.0, 16.0)]
    expected = []
    for sample in samples:
        few = thinned(sample.frames, sample.fps)
        images = torch.from_numpy(few).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            flow = [network(a[None], b[None], iters=20, test_mode=True)[1][0] for a, b in itertools.pairwise(images)]
        pairs = torch.stack(flow).permute(0, 2, 3, 1).numpy()
        expected.append(float(is_dynamic(top_magnitudes(pairs), len(few), min(few.shape[1:3]))))
    assert [row["dynamic_degree_vbench"] for row in metric.measure(samples)] == expected == [verdict] * len(samples)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("vbench.dynamic_degree", reason=f"VBench is not installed: {INSTALL}", exc_type=ImportError)
    with pytest.raises(RewardError, match=r"cannot load .*nothing\.pth"):
        VBenchMetrics.from_pretrained(tmp_path / "nothing.pth")
