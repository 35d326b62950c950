"""Published adapters: read by the pipeline's own loader, content-addressed, refused when damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from magicid import adapters
from magicid.adapters import AdapterManifest, AdapterRef, Alias, list_versions, publish, to_bytes, verify
from magicid.errors import AdapterError
from magicid.training import lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
MANIFEST = AdapterManifest(base_sha256="b" * 64, recipe_sha256="c" * 64, rank=4, alpha=2.0, metrics={"face_sim": 0.5})


def transformer() -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    ).eval()


def file(state: dict[str, torch.Tensor]) -> bytes:
    return to_bytes({f"transformer.{name}": tensor for name, tensor in state.items()}, MANIFEST.rank, MANIFEST.alpha)


def trained(model: HunyuanVideoTransformer3DModel, seed: int = 0) -> lora.LoraState:
    lora.attach(model, TARGETS, 4, 2.0)
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in lora.parameters(model, lora.POLICY).items():
        state[name] = 0.2 * torch.randn(parameter.shape, generator=random)
        parameter.data.copy_(state[name])
    return state


def output(model: HunyuanVideoTransformer3DModel) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 2, 4, 4, generator=random),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 5, 16, generator=random),
            encoder_attention_mask=torch.ones(1, 5),
            pooled_projections=torch.randn(1, 8, generator=random),
            guidance=torch.tensor([6000.0]),
            return_dict=False,
        )[0]


@pytest.fixture
def published(tmp_path: Path) -> AdapterRef:
    return publish(str(tmp_path), "anna", file(trained(transformer())), MANIFEST)


def test_the_pipelines_own_loader_reads_it_with_rank_and_alpha(tmp_path: Path) -> None:
    model = transformer()
    base = output(model)
    ref = publish(str(tmp_path), "anna", file(trained(model)), MANIFEST)
    expected = output(model)
    assert float((expected - base).abs().max()) > 1e-3
    plain = transformer()
    pipeline = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=plain,
        vae=None,
        scheduler=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.load_lora_weights(ref.location)
    assert torch.allclose(output(plain), expected, atol=1e-6)


def test_publishing_twice_changes_nothing(tmp_path: Path, published: AdapterRef) -> None:
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    again = publish(str(tmp_path), "anna", file(trained(transformer())), MANIFEST)
    assert again == published
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()} == files
    other = publish(str(tmp_path), "anna", file(trained(transformer(), seed=1)), MANIFEST)
    assert {ref.version for ref in list_versions(str(tmp_path), "anna")} == {published.version, other.version}
    assert list_versions(str(tmp_path), "nobody") == []


def test_the_manifest_says_what_it_was_made_of(published: AdapterRef) -> None:
    manifest = verify(published.location, "b" * 64)
    assert manifest["sha256"] == published.sha256
    assert published.version == published.sha256[:12]
    assert manifest["rank"] == 4
    assert manifest["alpha"] == 2.0
    assert manifest["metrics"] == {"face_sim": 0.5}
    assert manifest["identity_id"] == "anna"


def test_another_base_is_refused(published: AdapterRef) -> None:
    with pytest.raises(AdapterError, match="base model"):
        verify(published.location, "d" * 64)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest", "keys"])
def test_damage_is_refused_and_publishing_repairs_it(tmp_path: Path, published: AdapterRef, damage: str) -> None:
    weights, manifest = Path(published.weights), Path(published.location) / "manifest.json"
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[:-10])
    elif damage == "flipped":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text("[]")
    with pytest.raises(AdapterError, match="publish it again"):
        verify(published.location)
    publish(str(tmp_path), "anna", file(trained(transformer())), MANIFEST)
    verify(published.location, "b" * 64)


def test_a_file_that_is_not_safetensors_is_refused_even_with_its_hash(published: AdapterRef) -> None:
    import hashlib

    Path(published.weights).write_bytes(b"\x80\x04pickle")
    manifest = Path(published.location) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["sha256"] = hashlib.sha256(b"\x80\x04pickle").hexdigest()
    manifest.write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="not a safetensors file"):
        verify(published.location)


def light(run: str, seed: int, identity_id: str = "anna") -> str:
    """Publish an adapter of one small tensor; returns its version."""
    weights = to_bytes({"transformer.block.to_q.lora_A.weight": torch.full((1, 2), float(seed))}, 1, 1.0)
    return publish(run, identity_id, weights, MANIFEST).version


def test_identities_are_those_with_a_whole_adapter(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert adapters.list_identities(run) == []
    light(run, 1, "bruno"), light(run, 1, "anna")
    half = tmp_path / "adapters" / "eve" / "0123456789ab"
    half.mkdir(parents=True)
    (half / "manifest.json").write_text("{}")
    assert adapters.list_identities(run) == ["anna", "bruno"]
    assert adapters.list_identities(f"{run}/nowhere") == []


def test_a_damaged_manifest_hides_no_other_version(tmp_path: Path) -> None:
    run = str(tmp_path)
    first, second = light(run, 1), light(run, 2)
    (tmp_path / "adapters" / "anna" / first / "manifest.json").write_text("{")
    assert [ref.version for ref in list_versions(run, "anna")] == [second]
    with pytest.raises(AdapterError, match="not valid JSON"):
        adapters.read_manifest(f"{run}/adapters/anna/{first}")
    assert adapters.read_manifest(f"{run}/adapters/anna/{second}")["version"] == second


def test_an_alias_moves_and_goes_back(tmp_path: Path) -> None:
    run = str(tmp_path)
    one, two, three = (light(run, seed) for seed in (1, 2, 3))
    assert adapters.aliases(run, "anna") == {}
    adapters.set_alias(run, "anna", "prod", one)
    adapters.set_alias(run, "anna", "prod", one)  # nothing new: no past
    adapters.set_alias(run, "anna", "prod", two)
    adapters.set_alias(run, "anna", "prod", two, canary_version=three, canary_share=0.25)
    adapters.set_alias(run, "anna", "next", three)
    assert adapters.aliases(run, "anna") == {
        "prod": Alias(two, three, 0.25, (one,)),
        "next": Alias(three),
    }
    assert adapters.rollback(run, "anna", "prod") == Alias(two, previous=(one,))  # first the canary ends
    assert adapters.rollback(run, "anna", "prod") == Alias(one)
    assert adapters.aliases(run, "anna") == {"prod": Alias(one), "next": Alias(three)}
    with pytest.raises(AdapterError, match="only ever been"):
        adapters.rollback(run, "anna", "prod")
    with pytest.raises(AdapterError, match="its aliases: next, prod"):
        adapters.rollback(run, "anna", "beta")


@pytest.mark.parametrize("name", ["latest", "0123456789ab", "", "a/b", "..", "a b", "ä", "x" * 64, "prod\n"])
def test_names_that_cannot_be_aliases(tmp_path: Path, name: str) -> None:
    version = light(str(tmp_path), 1)
    with pytest.raises(AdapterError, match="cannot be an alias"):
        adapters.set_alias(str(tmp_path), "anna", name, version)
    assert adapters.aliases(str(tmp_path), "anna") == {}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_canary_needs_a_share(tmp_path: Path, share: float) -> None:
    run = str(tmp_path)
    one, two = light(run, 1), light(run, 2)
    with pytest.raises(AdapterError, match="canary"):
        adapters.set_alias(run, "anna", "prod", one, canary_version=two, canary_share=share)
    with pytest.raises(AdapterError, match="canary"):
        adapters.set_alias(run, "anna", "prod", one, canary_share=0.5)


def test_an_alias_stands_only_for_a_whole_version(tmp_path: Path) -> None:
    run = str(tmp_path)
    one, two = light(run, 1), light(run, 2)
    with pytest.raises(AdapterError, match=f"it has: {'.*'.join(sorted([one, two]))}"):
        adapters.set_alias(run, "anna", "prod", "../bruno")
    weights = tmp_path / "adapters" / "anna" / two / adapters.WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="truncated"):
        adapters.set_alias(run, "anna", "prod", two)
    with pytest.raises(AdapterError, match="truncated"):
        adapters.set_alias(run, "anna", "prod", one, canary_version=two, canary_share=0.5)
    assert adapters.aliases(run, "anna") == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"prod": "x"}', '{"prod": {"version": "x", "canary_share": 2}}'])
def test_damaged_aliases_are_said(tmp_path: Path, content: str) -> None:
    light(str(tmp_path), 1)
    (tmp_path / "adapters" / "anna" / "aliases.json").write_text(content)
    with pytest.raises(AdapterError, match=r"aliases\.json is damaged"):
        adapters.aliases(str(tmp_path), "anna")


def test_a_version_in_use_is_not_deleted_and_one_deleted_is_no_past(tmp_path: Path) -> None:
    run = str(tmp_path)
    one, two, three = (light(run, seed) for seed in (1, 2, 3))
    adapters.set_alias(run, "anna", "prod", one)
    adapters.set_alias(run, "anna", "prod", two)
    adapters.set_alias(run, "anna", "prod", two, canary_version=three, canary_share=0.5)
    for version in (two, three):
        with pytest.raises(AdapterError, match="in use as prod"):
            adapters.delete(run, "anna", version)
    assert adapters.delete(run, "anna", one) == [one]
    assert {ref.version for ref in list_versions(run, "anna")} == {two, three}
    assert adapters.aliases(run, "anna")["prod"].previous == ()
    with pytest.raises(AdapterError, match="has no adapter"):
        adapters.delete(run, "anna", one)


@pytest.mark.parametrize("damaged", [False, True])
def test_all_of_an_identity_goes_and_nothing_of_others(tmp_path: Path, damaged: bool) -> None:
    run = str(tmp_path)
    one, two, other = light(run, 1), light(run, 2), light(run, 1, "anna-2")
    adapters.set_alias(run, "anna", "prod", one)
    if damaged:
        (tmp_path / "adapters" / "anna" / two / "manifest.json").unlink()
        (tmp_path / "adapters" / "anna" / "aliases.json").write_text("{")
    assert adapters.delete(run, "anna") == sorted([one, two])
    assert not (tmp_path / "adapters" / "anna").exists()
    assert [ref.version for ref in list_versions(run, "anna-2")] == [other]
    with pytest.raises(AdapterError, match="no adapter of anna"):
        adapters.delete(run, "anna")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "anna/../bruno", "a\n"])
def test_an_id_is_never_a_path(tmp_path: Path, name: str) -> None:
    run = str(tmp_path / "run")
    light(run, 1)
    for act in (adapters.delete, adapters.list_versions, adapters.aliases):
        with pytest.raises(AdapterError, match="not an identity's id"):
            act(run, name)
    assert adapters.list_identities(run) == ["anna"]


def test_it_is_the_same_on_an_object_store() -> None:
    run = "memory://adapters-test/run"
    one, two = light(run, 1), light(run, 2)
    adapters.set_alias(run, "anna", "prod", one)
    adapters.set_alias(run, "anna", "prod", two)
    assert adapters.rollback(run, "anna", "prod") == Alias(one)
    assert adapters.list_identities(run) == ["anna"]
    assert adapters.delete(run, "anna", two) == [two]
    assert adapters.delete(run, "anna") == [one]
    assert adapters.list_identities(run) == []
