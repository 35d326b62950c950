"""The image: what the Dockerfile takes, what the lock holds, and that what is copied is a whole magicid."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import magicid
from tests.cluster.manifests import CLUSTER, ROOT, container, ray_pods

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
INSTRUCTIONS = [
    " ".join(line.split())
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    if line and not line.startswith("#")
]
FINAL = INSTRUCTIONS[max(i for i, line in enumerate(INSTRUCTIONS) if line.startswith("FROM")) :]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (CLUSTER / "requirements.lock").read_text()
LOCKED = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+) \\$", LOCK, re.M)}
EXTRAS = ("s3", "gcs", "postgres", "tracing", "tensorboard")  # those of lock.sh


def _words(instruction: str) -> list[str]:
    """The final stage's lines of one instruction, without its name."""
    return [line.partition(" ")[2] for line in FINAL if line.startswith(f"{instruction} ")]


# Dockerfile


def test_the_image_runs_as_nobody_and_starts_where_models_are() -> None:
    (user,) = _words("USER")
    assert {template["spec"]["securityContext"]["runAsUser"] for _, template in ray_pods()} == {int(user)}
    assert int(user) > 0
    (start,) = _words("WORKDIR")
    mounts = {m["mountPath"] for name, t in ray_pods() if name != "submitter" for m in container(t)["volumeMounts"]}
    assert mounts == {f"{start}/models"}


def test_the_image_has_what_others_call_in_it() -> None:
    (packages,) = re.findall(r"apt-get install --yes --no-install-recommends ([\w .-]+?) &&", " ".join(FINAL))
    assert {"wget", "rsync"} <= set(packages.split())  # KubeRay's probes; `ray up`
    (check,) = _words("HEALTHCHECK")
    assert "52365/api/local_raylet_healthz" in check  # asked of a real node: test_nodes.py
    (label,) = _words("LABEL")
    assert f'image.version="{magicid.__version__}"' in label
    exposed = {int(port) for port in _words("EXPOSE")[0].split()}
    bound = {
        p["containerPort"] for _, t in ray_pods() for p in container(t).get("ports", []) if "-metrics" not in p["name"]
    }
    assert exposed == bound


def test_no_layer_holds_a_secret_or_a_moving_target() -> None:
    sources = [line.split()[1] for line in INSTRUCTIONS if line.startswith("FROM")]
    sources += re.findall(r"--from=(\S+)", DOCKERFILE)
    stages = set(re.findall(r" AS (\w+)", DOCKERFILE))
    (cuda,) = re.findall(r"^ARG CUDA=(\S+)$", DOCKERFILE, re.M)
    for source in {*sources, cuda} - stages - {"${CUDA}"}:
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", source), source
    assert not re.search(r"(?i)(token|password|secret|key)\s*=\s*\S", re.sub("RAY_AUTH_MODE=token", "", DOCKERFILE))
    assert "--require-hashes" in DOCKERFILE


def test_the_base_is_the_cuda_of_the_locked_torch() -> None:
    (version,) = re.findall(r"^ARG CUDA=nvidia/cuda:(\d+\.\d+)", DOCKERFILE, re.M)
    assert LOCKED["nvidia-cuda-runtime"].startswith(f"{version}.")


def test_what_is_copied_exists_and_is_let_through() -> None:
    rules = (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n")
    assert "*" in rules
    copied = [
        w for line in INSTRUCTIONS if line.startswith("COPY") and "--from" not in line for w in line.split()[1:-1]
    ]
    assert {"magicid", "ray_jobs", "serve", "cluster/requirements.lock"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in rules


# Lock


@pytest.mark.parametrize(
    "text", [*PROJECT["dependencies"], *(r for e in EXTRAS for r in PROJECT["optional-dependencies"][e])]
)
def test_the_lock_holds_every_dependency_in_an_allowed_version(text: str) -> None:
    wanted = Requirement(text)
    assert wanted.specifier.contains(LOCKED[canonicalize_name(wanted.name)], prereleases=True)


def test_every_locked_package_has_a_hash_and_comes_by_name() -> None:
    entries = re.findall(r"^[\w.-]+==.*?(?=^\S|\Z)", LOCK, re.M | re.S)
    assert len(entries) == len(LOCKED) > 100
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in LOCK
    assert "opencv-python" not in LOCKED  # needs a desktop's libraries; the headless one is there
    assert "opencv-python-headless" in LOCKED
    assert "boto3" in LOCKED  # `ray up`
    assert not {"pytest", "ruff", "mypy"} & set(LOCKED)


# What lands in it


def test_what_is_copied_is_a_whole_magicid(tmp_path: Path) -> None:
    """Built and imported from nothing but what the Dockerfile copies: recipes, weights, pages, migrations."""
    source, target = tmp_path / "src", tmp_path / "code"
    source.mkdir()
    for line in INSTRUCTIONS:
        if line.startswith("COPY") and "--from" not in line and "requirements.lock" not in line:
            for name in line.split()[1:-1]:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, source / name)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True)
    missing = []
    for package in ("magicid", "ray_jobs", "serve"):
        here = {f.relative_to(ROOT) for f in (ROOT / package).rglob("*") if f.is_file() and f.suffix != ".pyc"}
        missing += [str(f) for f in here if not (target / f).exists()]
    assert missing == ["serve/config.yaml"]  # what `serve deploy` is given, from a checkout
    script = (
        "import magicid, ray_jobs.customize, serve.app; from magicid import recipe, weights;"
        f"assert magicid.__file__.startswith({str(target)!r}), magicid.__file__;"
        "[weights.resolve(f) for f in weights.model_folders(recipe.load('face-world'))]"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=tmp_path, env={"PYTHONPATH": str(target), "HOME": str(tmp_path)}
    )
    assert (target / "bin" / "magicid").exists()
