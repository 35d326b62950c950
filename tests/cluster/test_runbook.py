"""The runbook's commands are ones that exist, on files that exist."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer
from ray.scripts.scripts import cli as ray

import magicid.cli
import ray_jobs.customize
import serve.admin
from magicid import recipe
from tests.cluster.manifests import ROOT, documents, ray_clusters

RUNBOOK = (ROOT / "docs/runbook.md").read_text()
CODE = [line.strip() for line in RUNBOOK.splitlines() if line.startswith("    ")]


def _commands(start: str) -> list[list[str]]:
    """Words of every command of one program, in code blocks and between backticks."""
    found = [line for line in CODE if re.match(rf"(?:.*-- )?{start} [a-z]", line)]
    found += re.findall(rf"`({start} [^`]+)`", RUNBOOK)
    words = []
    for line in found:
        line = re.sub(rf"^.*?-- (?={start} )", "", line) if not line.startswith(start) else line
        words.append(shlex.split(re.split(r"\s[>&|]", line)[0], comments=True))
    return words


def _parse(command: Any, words: list[str]) -> None:
    """Descends through groups to the command and parses what follows; where only a name is given, finds it."""
    name, *rest = words
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    if rest:
        command.make_context(name, rest)  # raises for an option that does not exist


@pytest.mark.parametrize("words", _commands("magicid"), ids=" ".join)
def test_magicid_has_the_command(words: list[str]) -> None:
    _parse(typer.main.get_command(magicid.cli.app), words)


@pytest.mark.parametrize("words", _commands("ray"), ids=" ".join)
def test_ray_has_the_command(words: list[str]) -> None:
    if "--" in words:
        split = words.index("--")
        _parse(ray, [*words[:split], "entrypoint"])
        job = words[split + 1 :]
        assert job[:3] == ["python", "-m", "ray_jobs.customize"]
        given = typer.main.get_command(ray_jobs.customize.app).make_context("customize", job[3:]).params
        assert given["recipe_name"] in recipe.shipped()
        assert words[words.index("--submission-id") + 1] == given["out"].rsplit("/", 1)[-1]
    else:
        _parse(ray, words)


@pytest.mark.parametrize("words", _commands("python -m serve.admin"), ids=" ".join)
def test_the_endpoints_operator_has_the_command(words: list[str]) -> None:
    _parse(typer.main.get_command(serve.admin.app), words[2:])


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"(?:cluster|docs|serve)/[\w./-]*[\w/]", RUNBOOK))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_names_are_those_of_the_manifests() -> None:
    made = set(re.findall(r"create secret generic (\S+)", RUNBOOK))
    text = "".join((ROOT / f"cluster/kuberay/{name}.yaml").read_text() for name in ("cluster", "job", "service"))
    used = set(re.findall(r"(?:secretRef|secretKeyRef): {name: ([\w-]+)", text)) | set(
        re.findall(r"secretName: (\S+)", text)
    )
    assert made == used
    assert set(re.findall(r"-n (\S+)", " ".join(CODE))) == {"magicid"}
    (batch,) = (d["metadata"]["name"] for d in documents("kuberay/cluster.yaml"))
    assert set(re.findall(r"svc/(\S+)", RUNBOOK)) == {f"{batch}-head-svc"}
    assert set(re.findall(r"ray.io/cluster=([\w-]+)", RUNBOOK)) == {batch}
    components = set(re.findall(r"app.kubernetes.io/component=(\w+)", RUNBOOK))
    assert components <= set(ray_clusters())
    alerts = {
        r["alert"]
        for d in documents()
        if d["kind"] == "PrometheusRule"
        for g in d["spec"]["groups"]
        for r in g["rules"]
    }
    assert alerts == set(re.findall(r"`(Magicid\w+)`", RUNBOOK))
