"""One forward with a LoRA of its own for each row equals a forward of each row under PEFT's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magicid.backbones import load_backbone
from magicid.backbones.mixed_lora import LoraWeights, MixedLora
from magicid.errors import AdapterError
from tests.backbones.test_adapters import trained_lora
from tests.tiny_models import tiny_recipe

RECIPES = ["hunyuan-480p", "wan-480p"]
WORDS = ["a person nods in the kitchen", "a man jumps", "a woman talks", "a man walks on the beach", "snow"]


class Case:
    """A model with row-wise LoRAs, one with PEFT's, five rows of inputs, and adapters of ranks 2, 4 and 8."""

    def __init__(self, name: str, folder: Path) -> None:
        recipe = tiny_recipe(name, folder)
        self.states = [trained_lora(recipe, seed=rank, rank=rank)[1] for rank in (2, 4, 8)]
        self.mixed, self.peft = load_backbone(recipe), load_backbone(recipe)
        self.alpha = recipe.lora.alpha
        transformer = self.mixed.transformer
        self.names = [key for key, _ in transformer.named_modules()]
        self.rows = MixedLora(transformer, self.mixed.lora_target_modules())
        self.loras = [LoraWeights.from_published(state, recipe.lora.alpha, transformer) for state in self.states]
        random = torch.Generator().manual_seed(0)
        self.latents = torch.randn((5, *self.mixed.latent_shape()), generator=random)
        self.sigma = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
        self.guidance = torch.tensor([1.0, 2.0, 4.0, 6.0, 8.0])
        self.text = self.mixed.encode_prompts(WORDS)

    def together(self, loras: list[LoraWeights | None]) -> Tensor:
        self.rows.set_rows(loras)
        count = len(loras)
        text = {key: value[:count] for key, value in self.text.items()}
        with torch.no_grad():
            return self.mixed.predict_velocity(self.latents[:count], self.sigma[:count], text, self.guidance[:count])

    def alone(self, row: int, state: dict[str, Tensor] | None) -> Tensor:
        self.peft.load_adapter(state)
        text = {key: value[row : row + 1] for key, value in self.text.items()}
        latents, sigma = self.latents[row : row + 1], self.sigma[row : row + 1]
        with torch.no_grad():
            return self.peft.predict_velocity(latents, sigma, text, float(self.guidance[row]))[0]


@pytest.fixture(scope="module", params=RECIPES)
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Case:
    return Case(request.param, folders[request.param])


def test_rows_of_different_adapters_ranks_and_guidance_equal_peft(case: Case) -> None:
    small, middle, large = case.loras
    found = case.together([small, None, large, middle, small])
    states: list[Any] = [case.states[0], None, case.states[2], case.states[1], case.states[0]]
    for row, state in enumerate(states):
        torch.testing.assert_close(found[row], case.alone(row, state), atol=1e-5, rtol=0)
    assert (found[0] - case.alone(0, None)).abs().max() > 1e-2
    assert [key for key, _ in case.mixed.transformer.named_modules()] == case.names


def test_buffers_are_refilled_in_any_order(case: Case) -> None:
    small, middle, large = case.loras
    expected = {(row, n): case.alone(row, state) for row in range(3) for n, state in enumerate([*case.states, None])}
    choice: list[LoraWeights | None] = [small, middle, large, None]
    for rows in ([2, 2, 2], [0, 3, 1], [3, 3, 3], [0, 0], [1, 0, 2], [1], [3, 2], [2, 0, 1]):
        found = case.together([choice[n] for n in rows])
        for row, n in enumerate(rows):
            torch.testing.assert_close(found[row], expected[row, n], atol=1e-5, rtol=0)


def test_the_scale_belongs_to_the_row(case: Case) -> None:
    lora, state = case.loras[1], case.states[1]
    halved = {key: tensor * 0.5 if ".lora_B." in key else tensor for key, tensor in state.items()}
    for rows in ([lora.scaled(0.5), lora, lora.scaled(0)], [lora.scaled(0.5), lora.scaled(0.5)], [lora, lora]):
        found = case.together(list(rows))
        for row, scaled in enumerate(rows):
            expected = {case.alpha / 4: state, case.alpha / 8: halved, 0: None}[scaled.scale]
            torch.testing.assert_close(found[row], case.alone(row, expected), atol=1e-5, rtol=0)


def test_a_swap_allocates_nothing_and_keeps_no_adapter_alive(case: Case) -> None:
    small, middle, large = case.loras
    case.together([small, middle, large])
    before = [(site.a.data_ptr(), site.b.data_ptr()) for site in case.rows._sites.values()]
    for rows in ([large, small, None], [middle, middle], [None, large, small]):
        case.together(list(rows))
    assert [(site.a.data_ptr(), site.b.data_ptr()) for site in case.rows._sites.values()] == before
    held = [value for site in case.rows._sites.values() for key in site.held if key is not None for value in key]
    assert not any(isinstance(value, LoraWeights | Tensor) for value in held)


def test_a_broken_adapter_breaks_its_row_only_and_leaves_no_trace(case: Case) -> None:
    small, _, large = case.loras
    nan = float("nan")
    for factors in ((nan, 1), (1, nan)):
        tensors = {name: (a * factors[0], b * factors[1]) for name, (a, b) in large.tensors.items()}
        broken = LoraWeights(tensors, large.scale)
        for after in (None, small.scaled(2)):
            found = case.together([small, broken, large])
            assert not found[1].isfinite().all()
            torch.testing.assert_close(found[2], case.alone(2, case.states[2]), atol=1e-5, rtol=0)
            assert case.together([small, after, large]).isfinite().all()
    torch.testing.assert_close(case.together([None])[0], case.alone(0, None), atol=1e-5, rtol=0)


def test_an_adapter_of_some_modules_leaves_the_others(folders: dict[str, Path]) -> None:
    name = "hunyuan-480p"
    case = Case(name, folders[name])
    _, double = trained_lora(tiny_recipe(name, folders[name], lora__blocks="double"), seed=9)
    lora = LoraWeights.from_published(double, case.alpha, case.mixed.transformer)
    found = case.together([lora, case.loras[2], None])
    for row, state in enumerate([double, case.states[2], None]):
        torch.testing.assert_close(found[row], case.alone(row, state), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused(case: Case, folders: dict[str, Path]) -> None:
    state, transformer = case.states[0], case.mixed.transformer
    key = next(key for key in state if ".lora_A." in key)
    for broken in (
        {},
        {**state, key: torch.zeros(2, 7)},
        {name: tensor for name, tensor in state.items() if name != key},
        {**state, "transformer.elsewhere.lora_A.weight": torch.zeros(2, 24)},
        {**state, key: torch.full_like(state[key], float("nan"))},
        {**state, key: state[key][0]},
        {**state, key: state[key][None]},
        {name: tensor[:0] if ".lora_A." in name else tensor[:, :0] for name, tensor in state.items()},
    ):
        with pytest.raises(AdapterError):
            LoraWeights.from_published(broken, case.alpha, transformer)
    for alpha in ("8", None, float("nan")):
        with pytest.raises(AdapterError, match="alpha"):
            LoraWeights.from_published(state, alpha, transformer)
    with pytest.raises(AdapterError, match="no linear layer matches"):
        MixedLora(transformer, "elsewhere")
    foreign = LoraWeights({"elsewhere": (torch.zeros(2, 24), torch.zeros(24, 2))}, 1.0)
    before = case.together([case.loras[0]])
    with pytest.raises(AdapterError, match="elsewhere"):
        case.rows.set_rows([foreign])
    case.rows.set_rows([case.loras[0]])
    with pytest.raises(ValueError, match="for 1 rows, not 5"):
        case.mixed.predict_velocity(case.latents, case.sigma, case.text, 1.0)
    assert torch.equal(case.together([case.loras[0]]), before)


def test_weights_take_the_models_precision_and_count_their_bytes(folders: dict[str, Path]) -> None:
    recipe = tiny_recipe("wan-480p", folders["wan-480p"], backbone__dtype="bfloat16")
    _, state = trained_lora(tiny_recipe("wan-480p", folders["wan-480p"]))
    backbone = load_backbone(recipe)
    lora = LoraWeights.from_published(state, 8, backbone.transformer)
    assert lora.scale == 2
    assert lora.nbytes == sum(2 * tensor.numel() for tensor in state.values())
    assert {tensor.dtype for pair in lora.tensors.values() for tensor in pair} == {torch.bfloat16}
    MixedLora(backbone.transformer, backbone.lora_target_modules()).set_rows([lora, None])
    text = backbone.encode_prompts(WORDS[:2])
    with torch.inference_mode():
        velocity = backbone.predict_velocity(torch.randn(2, *backbone.latent_shape()), torch.rand(2), text, 1.0)
    assert velocity.isfinite().all()


def test_buffers_grow_in_rows_and_ranks() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5))
    rows = MixedLora(layer, "0")
    loras = [LoraWeights({"0": (torch.randn(rank, 6), torch.randn(5, rank))}, 0.5) for rank in (1, 2, 4)]
    x = torch.randn(4, 3, 6)
    for chosen in ([0, 1], [0, 1, 0], [0, 1, 0, 2], [0, 1]):
        rows.set_rows([loras[number] for number in chosen])
        with torch.no_grad():
            found = layer(x[: len(chosen)])
            for row, number in enumerate(chosen):
                a, b = loras[number].tensors["0"]
                expected = x[row] @ layer[0].weight.T + layer[0].bias + 0.5 * (x[row] @ a.T) @ b.T
                torch.testing.assert_close(found[row], expected)


def test_buffers_made_in_inference_mode_serve_outside_of_it() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5))
    rows = MixedLora(layer, "0")
    loras = [LoraWeights({"0": (torch.randn(3, 6), torch.randn(5, 3))}, 0.5) for _ in range(2)]
    with torch.inference_mode():
        rows.set_rows(loras)
    x = torch.randn(2, 4, 6)
    rows.set_rows([loras[1], loras[0]])
    with torch.no_grad():
        found = layer(x)
        for row, lora in enumerate((loras[1], loras[0])):
            a, b = lora.tensors["0"]
            expected = x[row] @ layer[0].weight.T + layer[0].bias + 0.5 * (x[row] @ a.T) @ b.T
            torch.testing.assert_close(found[row], expected)
