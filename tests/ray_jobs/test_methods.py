"""Rows of the comparison as jobs of their own: single frames, extended tokens, and adapters kept on the way."""

from __future__ import annotations

import json
import shutil

import pytest

from magicid import storage
from magicid.evaluation import results
from magicid.run import Run, training_uri
from magicid.schema import MetricRow
from magicid.training.tokens import TOKENS
from tests.ray_jobs import job

EXAMPLES = job.ROOT / "examples" / "identities"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """ada: DreamBooth on single frames for 6 steps; bruno: MagicMe with two tokens."""
    folder, out = tmp_path_factory.mktemp("people"), tmp_path_factory.mktemp("run")
    rows = []
    for name, recipe in (
        ("ada", {"sft.frames": 1, "sft.learning_rate": 5e-4}),
        ("bruno", {"sft.tokens": 2, "sft.learning_rate": 0.1}),
    ):
        shutil.copytree(EXAMPLES / name, folder / name)
        photos = [f"{name}/{photo.name}" for photo in sorted((folder / name).iterdir())]
        rows.append({"id": name, "owner": "t", "photos": photos, "overrides": recipe})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = tmp_path_factory.mktemp("log") / "job.log"
    assert job.finish(job.command(out, manifest, hpo__steps=0, evaluation__every=2), log) == 0, log.read_text()[-3000:]
    return Run(str(out))


def test_self_reconstruction_alone_is_measured_and_published(run: Run) -> None:
    rows = run.read_parts("evaluation/ada", MetricRow)
    assert {(row.method, row.step) for row in rows} == {("base", 0), ("sft", 6)}
    assert all(row.error is None for row in rows)
    assert not run.has("pairs/ada.parquet")
    (version,) = storage.list_folder(run.path("adapters", "ada"))[1]
    manifest = storage.read_json(run.path("adapters", "ada", version, "manifest.json"))
    assert manifest["metrics"]["face_sim_n"] == 2
    sft = [row for row in rows if row.method == "sft"]
    assert {row.adapter_sha256 for row in sft} == {manifest["sha256"]}
    assert {row.base_sha256 for row in sft} == {manifest["base_sha256"]}
    assert all(row.temporal_flickering is not None and row.clip_i is not None for row in sft)


def test_the_curve_has_the_adapters_on_the_way(run: Run) -> None:
    rows = run.read_parts("curve/ada", MetricRow)
    assert {(row.method, row.step) for row in rows} == {("sft", 2), ("sft", 4)}
    assert len({row.adapter_sha256 for row in rows}) == 2
    together = results.read([run.location])
    assert {row.step for row in together if row.method == "sft" and row.identity_id == "ada"} == {2, 4, 6}
    tokens = run.read_parts("curve/bruno", MetricRow)
    assert {(row.method, row.step) for row in tokens} == {("sft", 2), ("sft", 4)}
    assert len({row.adapter_sha256 for row in tokens}) == 2, "extended tokens are kept as they were at each step"


def test_extended_tokens_are_measured_and_not_published(run: Run) -> None:
    tokens = storage.read_arrays(run.path(training_uri("bruno", "sft", "pytorch_lora_weights.safetensors")))
    assert set(tokens) == {TOKENS}
    assert len(tokens[TOKENS]) == 2
    rows = {(row.method, row.seed): row for row in run.read_parts("evaluation/bruno", MetricRow)}
    assert {method for method, _ in rows} == {"base", "sft"}
    assert storage.list_files(run.path("adapters", "bruno")) == []
    for (method, seed), row in rows.items():
        if method == "sft":  # the tokens do something
            assert row.temporal_flickering != rows["base", seed].temporal_flickering
