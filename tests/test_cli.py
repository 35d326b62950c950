"""The command line: fast help, one-line errors with exit code 2, and what the look-at commands print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magicid import recipe, storage
from magicid.cli import app
from magicid.errors import RecipeError
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
