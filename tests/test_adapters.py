"""Published adapters: read by the pipeline's own loader, content-addressed, refused when damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from magicid.adapters import AdapterManifest, AdapterRef, list_versions, publish, to_bytes, verify
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
