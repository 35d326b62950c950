"""Training curves as other tools read them: from files, without an account or a server."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from magicid import recipe, storage
from magicid.errors import MagicIDError, RecipeError
from magicid.training import loggers
from magicid.training.loggers import Curves

ROWS = [{"step": 5.0, "loss": 0.5, "accuracy": 0.25}, {"step": 10.0, "loss": 0.125, "accuracy": 1.0}]


def record(names: list[str], place: str) -> None:
    curves = Curves(names, place, "ada/hpo", "s3://bucket/run")
    for row in ROWS:
        curves.log(row)
    curves.close()
    curves.close()


def test_tensorboard_reads_the_curves_and_a_resumed_one_counts_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(["tensorboard"], str(tmp_path))
    again = Curves(["tensorboard"], str(tmp_path), "ada/hpo", "run")  # it had come to step 7 only
    again.log({"step": 8.0, "loss": 0.3})
    again.log({"step": 10.0, "loss": 0.2})
    again.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["accuracy", "loss"]
    points = [(event.step, event.value) for event in found.Scalars("loss")]
    assert points == [(5, 0.5), (8, pytest.approx(0.3)), (10, pytest.approx(0.2))]


def test_mlflow_reads_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    record(["mlflow"], str(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("magicid")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("ada/hpo", "FINISHED")
    assert run.data.tags["magicid.run"] == "s3://bucket/run"
    points = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert points == [(5, 0.5), (10, 0.125)]


def test_wandb_keeps_an_offline_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is None:
        print("skipped: the extra `wandb` is not installed")
        pytest.skip("the extra `wandb` is not installed")
    script = (
        f"from tests.training.test_loggers import record; record(['wandb'], {str(tmp_path)!r})"  # it starts a service
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200, env=environment)
    (file,) = (tmp_path / "wandb").rglob("run-*.wandb")
    assert file.parent.name.startswith("offline-run-")
    assert b"accuracy" in file.read_bytes()


def test_files_go_where_the_run_is(tmp_path: Path) -> None:
    record(["tensorboard"], "memory://curves/training/ada/hpo/logs")
    (file,) = storage.list_files("memory://curves")
    assert file.startswith("memory:///curves/training/ada/hpo/logs/tensorboard/events.out.tfevents.")
    storage.remove("memory://curves")


def test_nothing_is_imported_or_written_by_default(tmp_path: Path) -> None:
    assert recipe.load("face-world").training.loggers == []
    script = (
        "import sys; from magicid.training.loggers import Curves; c = Curves([], sys.argv[1], 't', 'r');"
        "c.log({'step': 1.0, 'loss': 1.0}); c.close();"
        "assert not {'tensorboardX', 'mlflow', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers.check(["tensorboard"])
    monkeypatch.setitem(loggers.PACKAGES, "wandb", "wandb_is_not_here")
    with pytest.raises(MagicIDError, match=r"names 'wandb'.*pip install 'magicid\[wandb\]'"):
        loggers.check(["tensorboard", "wandb"])


def test_other_loggers_are_refused_and_none_changes_what_a_run_makes() -> None:
    with pytest.raises(RecipeError, match=r"training.loggers"):
        recipe.load("face-world", {"training.loggers": ["papyrus"]})
    plain, told = recipe.load("face-world"), recipe.load("face-world", {"training.loggers": ["mlflow"]})
    assert told.content_sha256 == plain.content_sha256


def test_a_logger_that_fails_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            pass

        def log(self, *_: object) -> None:
            raise OSError("no route to the server")

        def close(self) -> None:
            raise AssertionError("it was left out")

    monkeypatch.setitem(loggers._MAKE, "wandb", Broken)
    with caplog.at_level(logging.WARNING):
        record(["wandb", "tensorboard"], str(tmp_path))
    assert [r.message for r in caplog.records] == [
        "ada/hpo: the logger wandb failed and is left out: no route to the server"
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
