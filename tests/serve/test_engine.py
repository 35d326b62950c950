"""Videos that come and go in one batch are those that separate runs and the plain pipeline make."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from magicid.backbones import load_backbone
from magicid.backbones.mixed_lora import LoraWeights
from magicid.backbones.pipeline import PipelineBackbone
from magicid.errors import AdapterError, BackboneError, GenerationError
from serve.engine import BatchFull, Engine, Sample
from serve.schema import VideoRequest
from tests.backbones.test_adapters import trained_lora
from tests.tiny_models import tiny_hunyuan_folder, tiny_recipe, tiny_wan_folder

REQUEST = VideoRequest("a man jumps", 5, 32, 48, 8, 3, 6.0, 7)
LARGE = replace(REQUEST, prompt="snow", frames=9, height=48, seed=8)
# name -> (recipe, its changes): embedded guidance, embedded and true guidance, true guidance alone
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "hunyuan": ("hunyuan-480p", {}),
    "hunyuan with true guidance": ("hunyuan-480p", {"sampling__true_cfg_scale": 3.0}),
    "wan": ("wan-480p", {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    return {"hunyuan-480p": tiny_hunyuan_folder(root / "hunyuan"), "wan-480p": tiny_wan_folder(root / "wan")}


class Model:
    """A backbone for engines, and three adapters of ranks 2, 4 and 8 (0, 1, 2) with their published tensors."""

    def __init__(self, name: str, folder: Path, changes: dict[str, Any]) -> None:
        self.name, self.folder, self.changes = name, folder, changes
        self.recipe = tiny_recipe(name, folder, **changes)
        self.states = [trained_lora(self.recipe, seed=rank, rank=rank)[1] for rank in (2, 4, 8)]
        self.backbone = load_backbone(self.recipe)
        self.loras = [
            LoraWeights.from_published(state, self.recipe.lora.alpha, self.backbone.transformer)
            for state in self.states
        ]

    def engine(self, max_batch: int = 8) -> Engine:
        backbone = load_backbone(self.recipe)
        return Engine(backbone, max_batch=max_batch)

    def alone(self, request: VideoRequest, lora: LoraWeights | None) -> Tensor:
        engine = self.engine(1)
        engine.admit("only", request, lora)
        return finish(engine)["only"]

    def plain(self, request: VideoRequest, state: dict[str, Tensor] | None) -> tuple[PipelineBackbone, Tensor]:
        """`load_adapter` and `sample` under a recipe of the request's numbers."""
        numbers = {
            f"sampling__{key}": getattr(request, key)
            for key in ("frames", "height", "width", "steps", "guidance_scale")
        }
        numbers["sampling__negative_prompt"] = request.negative_prompt or ""
        backbone = load_backbone(tiny_recipe(self.name, self.folder, **{**self.changes, **numbers}))
        if state is not None:
            state = {key: tensor * request.lora_scale if ".lora_B." in key else tensor for key, tensor in state.items()}
        backbone.load_adapter(state)
        return backbone, backbone.sample([request.prompt], [request.seed])


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Model:
    name, changes = KINDS[request.param]
    return Model(name, folders[name], changes)


@pytest.fixture(scope="module")
def hunyuan(folders: dict[str, Path]) -> Model:
    return Model("hunyuan-480p", folders["hunyuan-480p"], {})


def finish(engine: Engine) -> dict[str, Tensor]:
    """Latents of all videos in the batch, by key, stepped to their ends."""
    found = {}
    for _ in range(100):
        for sample in engine.step():
            assert sample.latents is not None, sample.error
            found[sample.key] = sample.latents
        if not engine.progress():
            return found
    raise AssertionError("the batch did not empty")


def mixture(model: Model) -> list[tuple[VideoRequest, int | None]]:
    """Requests that differ in all, with the number of their adapter; None: the base model."""
    return [
        (REQUEST, 0),
        (replace(REQUEST, prompt="a woman talks", steps=5, guidance_scale=2.0, seed=1, negative_prompt="beach"), 2),
        (replace(REQUEST, prompt="a person nods in the kitchen", steps=2, seed=2, guidance_scale=1.0), None),
        (LARGE, 1),
        (replace(LARGE, steps=4, seed=5, lora_scale=0.5), 2),
        (replace(REQUEST, seed=9, lora_scale=1.5), 1),
    ]


def test_a_mixed_batch_equals_separate_runs_and_the_plain_pipeline(model: Model) -> None:
    engine, cases = model.engine(), mixture(model)
    loras = [None if number is None else model.loras[number] for _, number in cases]
    waiting = {f"video {row}": (request, loras[row]) for row, (request, _) in enumerate(cases)}
    found: dict[str, Tensor] = {}
    for keys in (["video 0", "video 1"], ["video 2", "video 3"], ["video 4"], ["video 5"]):  # each one step later
        for key in keys:
            engine.admit(key, *waiting[key])
        found |= {sample.key: sample.latents for sample in engine.step() if sample.latents is not None}
    assert "video 2" in found  # two steps: it has left while the others are on their way
    assert "video 1" in engine.progress()
    found |= finish(engine)
    for row, (request, number) in enumerate(cases):
        latents = found[f"video {row}"]
        torch.testing.assert_close(latents, model.alone(request, loras[row]), atol=1e-5, rtol=0)
        _, plain = model.plain(request, None if number is None else model.states[number])
        assert latents.shape == plain.shape
        torch.testing.assert_close(latents, plain, atol=1e-5, rtol=0)


def test_another_identity_compiles_nothing_anew(hunyuan: Model) -> None:
    """Backend `eager`: what is traced and guarded is that of every backend, without waiting for a code generator."""
    torch._dynamo.reset()
    engine = hunyuan.engine()
    compiled = Engine(load_backbone(hunyuan.recipe), max_batch=8, compiler="eager")
    traced = []
    for key, lora in (("rank 8", hunyuan.loras[2]), ("rank 4", hunyuan.loras[1]), ("rank 2", hunyuan.loras[0])):
        for each in (engine, compiled):
            each.admit(key, REQUEST, lora)
        torch.testing.assert_close(finish(compiled)[key], finish(engine)[key], atol=1e-5, rtol=0)
        traced.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert traced[0] > 0
    assert traced == [traced[0]] * 3
    for each in (engine, compiled):
        each.admit("base", REQUEST, None)
    torch.testing.assert_close(finish(compiled)["base"], finish(engine)["base"], atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced[0]


def test_a_finished_video_is_decoded_as_the_backbone_does(hunyuan: Model) -> None:
    engine = hunyuan.engine()
    engine.admit("a", LARGE, hunyuan.loras[0])
    latents = finish(engine)["a"]
    frames = engine.decode(latents, LARGE)
    backbone, plain = hunyuan.plain(LARGE, hunyuan.states[0])
    assert frames.shape == (9, 48, 48, 3)
    assert np.abs(frames.astype(int) - backbone.decode(plain)[0]).max() <= 1
    with pytest.raises(GenerationError, match=r"not \(5, 32, 48, 3\)"):
        engine.decode(latents, REQUEST)


def test_videos_decoded_together_are_those_decoded_alone(hunyuan: Model) -> None:
    engine = hunyuan.engine()
    requests = [REQUEST, LARGE, replace(REQUEST, seed=1), replace(REQUEST, seed=2)]
    for number, request in enumerate(requests):
        engine.admit(str(number), request, None)
    latents = finish(engine)
    together = engine.decode_all([(latents[str(number)], request) for number, request in enumerate(requests)])
    for number, request in enumerate(requests):
        alone = engine.decode(latents[str(number)], request)
        assert np.abs(together[number].astype(int) - alone).max() <= 1
    assert np.abs(together[0].astype(int) - together[2]).max() > 1


def test_progress_counts_steps(hunyuan: Model) -> None:
    engine = hunyuan.engine()
    assert engine.step() == []
    engine.admit("three", REQUEST, None)
    engine.admit("four", replace(REQUEST, steps=4), None)
    assert engine.progress() == {"three": 0, "four": 0}
    assert engine.step() == []
    assert engine.progress() == {"three": 33, "four": 25}
    assert engine.step() == []
    assert engine.progress() == {"three": 66, "four": 50}
    assert [sample.key for sample in engine.step()] == ["three"]
    assert engine.progress() == {"four": 75}
    assert [sample.key for sample in engine.step()] == ["four"]
    assert engine.progress() == {}


def test_a_dropped_video_is_never_returned_and_the_others_do_not_notice(hunyuan: Model) -> None:
    engine = hunyuan.engine()
    for key, lora in zip("abc", hunyuan.loras):
        engine.admit(key, REQUEST, lora)
    engine.step()
    engine.drop("b")
    engine.drop("absent")
    assert set(engine.progress()) == {"a", "c"}
    found = finish(engine)
    assert set(found) == {"a", "c"}
    for key, lora in (("a", hunyuan.loras[0]), ("c", hunyuan.loras[2])):
        torch.testing.assert_close(found[key], hunyuan.alone(REQUEST, lora), atol=1e-5, rtol=0)


def test_a_video_dropped_during_its_last_step_is_not_returned(hunyuan: Model) -> None:
    engine = hunyuan.engine()
    engine.admit("a", replace(REQUEST, steps=1), None)
    engine.admit("b", replace(REQUEST, steps=1), None)
    hook = engine._backbone.transformer.register_forward_pre_hook(lambda *_: engine.drop("a"))
    assert [sample.key for sample in engine.step()] == ["b"]
    hook.remove()
    assert engine.progress() == {}


def test_numbers_that_are_not_finite_fail_their_row_alone(hunyuan: Model) -> None:
    engine, good = hunyuan.engine(), hunyuan.loras[0]
    huge = LoraWeights({name: (a * 1e30, b * 1e30) for name, (a, b) in good.tensors.items()}, good.scale)
    engine.admit("bad", REQUEST, huge)
    engine.admit("good", REQUEST, good)
    (failed,) = engine.step()
    assert failed == Sample("bad", error=failed.error)
    assert isinstance(failed.error, GenerationError)
    assert "bad became NaN or infinite at step 1 of 3" in str(failed.error)
    assert REQUEST.prompt not in str(failed.error)
    engine.admit("later", replace(REQUEST, seed=3), None)  # takes the broken adapter's place in the buffers
    found = finish(engine)
    torch.testing.assert_close(found["good"], hunyuan.alone(REQUEST, good), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["later"], hunyuan.alone(replace(REQUEST, seed=3), None), atol=1e-5, rtol=0)


def test_a_batch_that_does_not_fit_into_memory_goes_on_row_by_row(hunyuan: Model) -> None:
    engine = hunyuan.engine()
    engine.admit("a", REQUEST, hunyuan.loras[0])
    engine.admit("b", replace(REQUEST, seed=2), hunyuan.loras[1])
    engine.admit("large", LARGE, None)

    def limit(module: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Tensor]) -> None:
        if inputs["hidden_states"].numel() > 4 * 2 * 4 * 6:  # the latents of one REQUEST
            raise torch.OutOfMemoryError("tried to allocate too much")

    engine._backbone.transformer.register_forward_pre_hook(limit, with_kwargs=True)
    (failed,) = engine.step()
    assert failed.key == "large"
    assert "large does not fit into memory" in str(failed.error)
    found = finish(engine)
    torch.testing.assert_close(found["a"], hunyuan.alone(REQUEST, hunyuan.loras[0]), atol=1e-5, rtol=0)
    expected = hunyuan.alone(replace(REQUEST, seed=2), hunyuan.loras[1])
    torch.testing.assert_close(found["b"], expected, atol=1e-5, rtol=0)


def test_videos_join_from_other_threads_while_the_batch_moves(hunyuan: Model) -> None:
    engine, found = hunyuan.engine(), {}
    requests = {str(number): replace(REQUEST, seed=number, prompt=f"a man jumps {number}") for number in range(8)}
    with ThreadPoolExecutor(4) as pool:
        joins = [
            pool.submit(engine.admit, key, request, hunyuan.loras[int(key) % 3]) for key, request in requests.items()
        ]
        while not all(join.done() for join in joins):
            found |= {sample.key: sample.latents for sample in engine.step()}
        for join in joins:
            join.result()
    found |= finish(engine)
    assert set(found) == set(requests)
    for key in ("0", "7"):
        expected = hunyuan.alone(requests[key], hunyuan.loras[int(key) % 3])
        torch.testing.assert_close(found[key], expected, atol=1e-5, rtol=0)


def test_what_cannot_join_is_refused_and_the_batch_goes_on(hunyuan: Model) -> None:
    engine = hunyuan.engine(max_batch=2)
    engine.admit("a", REQUEST, None)
    with pytest.raises(GenerationError, match="a is in the batch already"):
        engine.admit("a", REQUEST, None)
    with pytest.raises(BackboneError, match=r"sampling\.frames = 6"):
        engine.admit("b", replace(REQUEST, frames=6), None)
    with pytest.raises(BackboneError, match=r"sampling\.width = 40"):
        engine.admit("b", replace(REQUEST, width=40), None)
    foreign = LoraWeights({"elsewhere": (torch.zeros(2, 24), torch.zeros(24, 2))}, 1.0)
    with pytest.raises(AdapterError, match="elsewhere"):
        engine.admit("b", REQUEST, foreign)
    engine.admit("b", REQUEST, None)
    with pytest.raises(BatchFull, match="the batch of 2 is full"):
        engine.admit("c", REQUEST, None)
    found = finish(engine)
    torch.testing.assert_close(found["a"], found["b"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found["a"], hunyuan.plain(REQUEST, None)[1], atol=1e-5, rtol=0)


def test_no_prompt_is_kept(hunyuan: Model) -> None:
    engine = hunyuan.engine()
    for number in range(3):
        engine.admit(str(number), replace(REQUEST, prompt=f"a man {number}"), None)
    finish(engine)
    assert engine._backbone._texts == {}
    assert engine._backbone.recipe == hunyuan.recipe
