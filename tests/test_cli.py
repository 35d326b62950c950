"""The command line: fast help, one-line errors with exit code 2, and what the look-at commands print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from magicid import adapters, recipe, storage
from magicid.cli import app
from magicid.clips import encode_mp4
from magicid.errors import RecipeError
from magicid.provenance import Claim, Signer, sign
from tests.report.fake_run import fill

cli = CliRunner()
WIDE = {"COLUMNS": "240", "TERMINAL_WIDTH": "240"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fill(str(tmp_path_factory.mktemp("run")), ("ada",), takes=1).location


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from magicid.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "assert not {'torch', 'numpy', 'pyarrow', 'pydantic', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_recipes_are_listed_with_a_line_each() -> None:
    output = cli.invoke(app, ["recipes"], env=WIDE).output
    for name in recipe.shipped():
        assert name in output
    assert "61 frames of 1280x720" in output


def test_adapters_are_listed_shown_and_verified(run: str) -> None:
    listed = cli.invoke(app, ["adapters", "list", run], env=WIDE)
    (file,) = Path(run, "adapters").glob("ada/*/manifest.json")
    assert file.parent.name in listed.output
    shown = cli.invoke(app, ["adapters", "show", run, f"ada@{file.parent.name[:6]}"])
    assert json.loads(shown.output)["sha256"] == json.loads(file.read_text())["sha256"]
    assert cli.invoke(app, ["adapters", "verify", run], env=WIDE).exit_code == 0


def test_a_damaged_adapter_is_found(tmp_path: Path) -> None:
    run = fill(str(tmp_path), ("ada",), takes=1).location
    (weights,) = Path(run, "adapters").glob("ada/*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    result = cli.invoke(app, ["adapters", "verify", run], env=WIDE)
    assert result.exit_code == 1
    assert "truncated or corrupt" in result.output
    weights.unlink()
    assert cli.invoke(app, ["adapters", "verify", run], env=WIDE).exit_code == 1


@pytest.fixture
def versions(tmp_path: Path) -> list[str]:
    """Three versions of ada and one of bruno in `tmp_path`; those of ada."""
    manifest = adapters.AdapterManifest("b" * 64, "c" * 64, rank=1, alpha=1)
    made = []
    for seed, person in enumerate(("ada", "ada", "ada", "bruno")):
        tensor = torch.full((1, 2), float(seed))
        weights = adapters.to_bytes({"transformer.block.to_q.lora_A.weight": tensor}, 1, 1.0)
        made.append(adapters.publish(str(tmp_path), person, weights, manifest).version)
    return made[:3]


def test_an_alias_is_set_listed_and_rolled_back(tmp_path: Path, versions: list[str]) -> None:
    run, (one, two, three) = str(tmp_path), versions
    said = cli.invoke(app, ["adapters", "alias", run, f"ada@{one}", "prod"])
    assert (said.exit_code, said.output) == (0, f"prod is {one}\n")
    cli.invoke(app, ["adapters", "alias", run, f"ada@{two}", "prod"])
    said = cli.invoke(app, ["adapters", "alias", run, f"ada@{two}", "prod", "--canary", three, "--share", "0.1"])
    assert said.output == f"prod is {two}, {three} for 10% of the requests; before: {one}\n"
    listed = cli.invoke(app, ["adapters", "list", run], env=WIDE).output.splitlines()
    named = {line.split()[1]: line.split("bbbbbbbbbbbb")[1].strip() for line in listed[1:]}
    assert len(named) == 4
    assert (named[one], named[two], named[three]) == ("", "prod", "prod canary 10%")
    assert cli.invoke(app, ["adapters", "rollback", run, "ada", "prod"]).output == f"prod is {two}; before: {one}\n"
    assert cli.invoke(app, ["adapters", "rollback", run, "ada", "prod"]).output == f"prod is {one}\n"
    assert cli.invoke(app, ["adapters", "verify", run], env=WIDE).exit_code == 0


def test_adapters_are_deleted_after_a_question(tmp_path: Path, versions: list[str]) -> None:
    run, (one, two, _) = str(tmp_path), versions
    cli.invoke(app, ["adapters", "alias", run, f"ada@{one}", "prod"])
    refused = cli.invoke(app, ["adapters", "delete", run, f"ada@{one}", "--yes"])
    assert refused.exit_code == 2
    assert "in use as prod" in refused.stderr
    assert cli.invoke(app, ["adapters", "delete", run, "ada"], input="n\n").exit_code == 1
    assert len(adapters.list_versions(run, "ada")) == 3
    assert cli.invoke(app, ["adapters", "delete", run, f"ada@{two}", "--yes"]).output == f"removed ada@{two}\n"
    gone = cli.invoke(app, ["adapters", "delete", run, "ada"], input="y\n")
    assert "all adapters of ada" in gone.output
    assert gone.output.count("removed ada@") == 2
    assert adapters.list_identities(run) == ["bruno"]


def test_damaged_aliases_are_said_and_hide_no_adapter(tmp_path: Path, versions: list[str]) -> None:
    (tmp_path / "adapters" / "ada" / "aliases.json").write_text("{")
    listed = cli.invoke(app, ["adapters", "list", str(tmp_path)], env=WIDE)
    assert listed.exit_code == 0
    assert all(version in listed.stdout for version in versions)
    assert listed.stderr.startswith("warning ")
    assert "aliases.json is damaged" in listed.stderr


def test_provenance_of_a_clip_is_told_with_an_exit_code(tmp_path: Path) -> None:
    plain, marked, changed, root = (str(tmp_path / name) for name in ("a.mp4", "b.mp4", "c.mp4", "keys/root.pem"))
    video = encode_mp4(np.random.default_rng(0).integers(0, 255, (3, 48, 48, 3), dtype=np.uint8), 8)
    claim = Claim("face-world", "b" * 64, "28ae72f7565f", "2026-11-24T10:00:00+00:00")
    signed = sign(video, claim, Signer.self_made(tmp_path / "keys"))
    Signer.self_made(tmp_path / "others")
    Path(plain).write_bytes(video)
    Path(marked).write_bytes(signed)
    at = signed.rindex(b"mdat") + 100
    Path(changed).write_bytes(signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :])

    def told(*arguments: str) -> tuple[int, str]:
        result = cli.invoke(app, ["provenance", *arguments], env=WIDE)
        return result.exit_code, result.output

    code, text = told(marked, "--root", root)
    assert (code, text.splitlines()[0]) == (0, "valid")
    for part in ("magicid (trusted)", "28ae72f7565f", "face-world", "b" * 64, "2026-11-24T10:00:00+00:00"):
        assert part in text
    code, text = told(marked)
    assert (code, "give --root to check" in text) == (0, True)
    code, text = told(marked, "--root", str(tmp_path / "others" / "root.pem"))
    assert (code, "not signed under" in text) == (1, True)
    code, text = told(changed)
    assert (code, text.splitlines()[0]) == (1, "not valid")
    assert told(plain) == (3, "none\n")
    assert told(str(tmp_path / "nothing.mp4"))[0] == 2


def test_the_report_is_built_again(run: str) -> None:
    result = cli.invoke(app, ["report", run])
    assert result.output.strip() == f"{run}/report.html"
    assert storage.read_bytes(f"{run}/report.html").startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "memory://nowhere"], "error memory://nowhere is not a run directory"),
        (["adapters", "list", "memory://nowhere"], "has no published adapter"),
        (["check", "--recipe", "faceworld"], "did you mean 'face-world'?"),
        (["check", "--hpo.betta=5"], "did you mean 'hpo.beta'?"),
        (["check", "--hpo.beta"], "recipe keys are given as --section.key=value"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = cli.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_manifest_is_read_without_models(tmp_path: Path) -> None:
    lines = [
        {"id": "ada", "owner": "studio", "photos": ["1.png", "2.png", "3.png"], "class_word": "woman"},
        {"id": "bruno", "owner": "studio", "photos": ["1.png"], "class_word": "man"},
        {"id": "no/good", "owner": "studio", "photos": ["1.png", "2.png", "3.png"]},
        {"id": "eve", "photos": ["1.png", "2.png", "3.png"], "overrides": {"backbone.path": "x"}},
    ]
    manifest = tmp_path / "people.jsonl"
    manifest.write_text("\n".join(json.dumps(line) for line in lines))
    result = cli.invoke(app, ["identities", str(manifest)], env=WIDE)
    assert result.exit_code == 0, result.output
    assert "1 of 4 identities can be tried" in result.output
    for part in ("woman", "photos: 1; the recipe wants at least 3", "no/good", "cannot override 'backbone.path'"):
        assert part in result.output
    loose = cli.invoke(app, ["identities", str(manifest), "--identities.min_photos=1"], env=WIDE)
    assert "2 of 4 identities can be tried" in loose.output


def test_check_names_what_is_missing_and_fails(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    options = ["--out", f"{blocked}/run", "--cpus", "64", "--gpu-gib", "80", "--rewards.motion=models/none"]
    result = cli.invoke(app, ["check", "--recipe", "hunyuan-paper", *options], env=WIDE)
    assert result.exit_code == 1, result.output
    for part in (
        "backbone.path",
        "models/HunyuanVideo",
        "models/none",
        "Tencent",
        "cannot write",
        "the run would fail",
    ):
        assert part in result.output


def test_an_unknown_adapter_names_those_there_are(run: str) -> None:
    result = cli.invoke(app, ["adapters", "show", run, "bruno"])
    assert result.exit_code == 2
    assert "there are: ada@" in result.stderr


def test_overrides_are_parsed_as_toml() -> None:
    parsed = recipe.parse_overrides(
        ["--hpo.beta=500", "--backbone.path=a=b", "--trainer.precision=bfloat16", "--hpo.beta=7"]
    )
    assert parsed == {"hpo.beta": 7, "backbone.path": "a=b", "trainer.precision": "bfloat16"}
    assert recipe.parse_overrides([]) == {}


@pytest.mark.parametrize("argument", ["--hpo.beta", "hpo.beta=5", "--=5", "--hpo.=5", "5"])
def test_a_malformed_override_is_refused(argument: str) -> None:
    with pytest.raises(RecipeError, match="cannot read the argument"):
        recipe.parse_overrides([argument])
