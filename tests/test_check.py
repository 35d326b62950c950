"""What `check` finds: on an empty machine, on complete tiny folders, and for each thing that can lack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from magicid import memory, recipe
from magicid.check import Finding, check
from tests.tiny_models import tiny_hunyuan_folder, tiny_recipe, tiny_wan_folder


def found(findings: list[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def only(findings: list[Finding], subject: str) -> Finding:
    (finding,) = found(findings, subject)
    return finding


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("check")
    return {"hunyuan-480p": tiny_hunyuan_folder(root / "h"), "wan-480p": tiny_wan_folder(root / "w")}


def complete(folders: dict[str, Path], name: str, root: Path, **changes: Any) -> recipe.Recipe:
    """A recipe whose every model folder holds something."""
    for model in ("faces", "raft", "vlm"):
        (root / model).mkdir(exist_ok=True)
        (root / model / "model.onnx").write_bytes(b"x")
    models = {
        "rewards__identity": str(root / "faces"),
        "rewards__motion": str(root / "raft"),
        "rewards__semantics": str(root / "vlm"),
        "rewards__semantics_frames": 5,
        "evaluation__identity": str(root / "faces"),
    }
    return tiny_recipe(name, folders[name], **models, **changes)


@pytest.mark.parametrize("name", ["hunyuan-480p", "hunyuan-paper", "wan-480p"])
def test_missing_weights_are_named_one_by_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = check(recipe.load(name))
    errors = {finding.subject: finding.problem for finding in findings if finding.level == "error"}
    keys = {"backbone.path", "rewards.identity", "rewards.motion", "rewards.semantics", "evaluation.identity"}
    assert set(errors) == keys
    assert "models/antelopev2" in errors["rewards.identity"]
    assert all(finding.action for finding in findings if finding.level != "ok")


def test_licences_to_accept_are_warnings() -> None:
    hunyuan = check(recipe.load("hunyuan-480p"))
    assert only(hunyuan, "backbone.licence").level == "warning"
    assert "South Korea" in only(hunyuan, "backbone.licence").problem
    research = [f for f in hunyuan if "non-commercial" in f.problem]
    assert {f.subject for f in research} == {"rewards.identity", "evaluation.identity"}
    assert only(check(recipe.load("wan-480p")), "backbone.licence").level == "ok"


@pytest.mark.parametrize("name", ["hunyuan-480p", "wan-480p"])
def test_a_complete_set_up_has_no_error(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    findings = check(complete(folders, name, tmp_path), str(tmp_path / "run"), cpus=32, gpu_gib=80)
    assert [f for f in findings if f.level == "error"] == []
    assert only(findings, "storage").level == "ok"
    assert only(findings, "CPUs for Ray Data").problem.startswith("the actor pools leave 26 of 32")


def test_an_incomplete_or_wrong_pipeline_folder_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    (folders["wan-480p"] / "transformer").rename(tmp_path / "moved")
    try:
        finding = only(check(complete(folders, "wan-480p", tmp_path)), "backbone.path")
        assert finding.level == "error"
        assert finding.problem.endswith("transformer")
    finally:
        (tmp_path / "moved").rename(folders["wan-480p"] / "transformer")
    wrong = complete(folders, "wan-480p", tmp_path).with_overrides({"backbone.path": str(folders["hunyuan-480p"])})
    assert "not a WanPipeline" in only(check(wrong), "backbone.path").problem


def test_sizes_are_read_from_the_folder_without_loading_it(folders: dict[str, Path]) -> None:
    from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

    for name, cls in (("hunyuan-480p", HunyuanVideoTransformer3DModel), ("wan-480p", WanTransformer3DModel)):
        size = memory.video_model_size("wan", folders[name])
        model = cls.from_pretrained(folders[name], subfolder="transformer")
        assert size.transformer == sum(p.numel() for p in model.parameters())
        assert size.width == 24
        assert (size.temporal, size.patch) == (4, 16)
        assert size.blocks == 2
        assert size.projections == (11 if name == "hunyuan-480p" else 16)


@pytest.mark.parametrize(("height", "width", "published_gb"), [(720, 1280, 60), (544, 960, 45)])
def test_the_estimate_is_near_the_authors_figures(height: int, width: int, published_gb: float) -> None:
    """HunyuanVideo's own table of peak memory for sampling 129 frames."""
    changes = {"sampling.frames": 129, "sampling.height": height, "sampling.width": width}
    need = memory.sampling_memory(recipe.load("hunyuan-paper", changes), memory.PUBLISHED["hunyuan"])
    assert need.total * memory.GIB / 1e9 == pytest.approx(published_gb, rel=0.15)


def test_training_memory_follows_its_formula() -> None:
    settings, size = recipe.load("hunyuan-paper"), memory.PUBLISHED["hunyuan"]
    assert memory.tokens(settings, size) == 57_600 + 256
    need = memory.training_memory(settings, size)
    assert need.weights == pytest.approx(12.8e9 * 2 / 2**30)
    assert need.adapters == pytest.approx(280 * 2 * 3072 * 32 * 20 / 2**30)
    assert need.activations == pytest.approx(57_856 * 3072 * (2 * 60 + 34) / 2**30)
    shared = settings.with_overrides({"trainer.zero_stage": 3, "resources.workers_per_slot": 4})
    assert memory.training_memory(shared, size).weights == pytest.approx(need.weights / 4)
    plain = settings.with_overrides({"trainer.gradient_checkpointing": False})
    assert memory.training_memory(plain, size).activations == pytest.approx(57_856 * 3072 * 34 * 60 / 2**30)


@pytest.mark.parametrize(("gpu_gib", "level"), [(24, "error"), (55, "warning"), (80, "ok")])
def test_memory_is_compared_with_the_gpu(gpu_gib: float, level: str) -> None:
    finding = only(check(recipe.load("hunyuan-paper"), gpu_gib=gpu_gib), "memory of a training worker")
    assert finding.level == level
    assert "about 50." in finding.problem


def test_cpus_left_for_ray_data() -> None:
    settings = recipe.load("hunyuan-480p", {"resources.slots": 2})
    assert only(check(settings, cpus=6), "CPUs for Ray Data").level == "error"  # pools take 2 + 2 + 1 + 1
    assert "take 6 of 6" in only(check(settings, cpus=6), "CPUs for Ray Data").problem
    assert only(check(settings, cpus=7), "CPUs for Ray Data").level == "ok"
    many = settings.with_overrides({"resources.slots": 8})
    assert only(check(many, cpus=7), "CPUs for training").level == "error"
    assert only(check(many, cpus=8), "CPUs for training").level == "ok"


def test_an_unwritable_location_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    findings = check(recipe.load("wan-480p"), str(tmp_path / "file" / "run"))
    assert only(findings, "storage").level == "error"
    assert "file/run" in only(findings, "storage").problem
    assert not list(tmp_path.glob("**/*probe*"))
    unknown = only(check(recipe.load("wan-480p"), "nosuch://key:pass@h/run"), "storage")
    assert unknown.level == "error"
    assert unknown.problem.startswith("cannot open nosuch://h/run/")


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts.training": 21},
        {"prompts.name": "nothing"},
        {"prompts.source": "openai"},
        {"prompts.source": "transformers", "prompts.model": "models/none"},
        {"prompts.heldout": 0},
    ],
)
def test_prompts_that_cannot_be_had_are_an_error(changes: dict[str, Any]) -> None:
    assert [f.level for f in found(check(recipe.load("wan-480p", changes)), "prompts")] == ["error"]
    assert found(check(recipe.load("wan-480p")), "prompts") == []


def test_checking_imports_no_model_code() -> None:
    script = (
        "import sys; from magicid import recipe; from magicid.check import check; check(recipe.load('hunyuan-480p'));"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
