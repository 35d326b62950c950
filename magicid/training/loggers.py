"""Training curves for TensorBoard, MLflow and Weights & Biases: `training.loggers = ["tensorboard"]`. Off by default.

`log.parquet` and report.html hold the curves anyway; these are for who has such a tool. No account is needed: files go
to `training/<id>/<stage>/logs/<logger>/` of the run, so that deleting a person deletes them; or to `training.folder`.

    tensorboard   pip install 'magicid[tensorboard]'. Event files: tensorboard --logdir RUN/training
    mlflow        pip install 'magicid[mlflow]'. A file store: mlflow ui --backend-store-uri FOLDER;
                  or the server that MLFLOW_TRACKING_URI names
    wandb         pip install 'magicid[wandb]'. An offline run: wandb sync FOLDER/wandb/offline-run-*;
                  or, with WANDB_MODE=online and a key in the environment, its server

A logger that fails is warned of once and left out: curves must not cost a training.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from magicid import storage
from magicid.errors import MagicIDError

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # what must be importable
KEPT_EVERY_S = 60.0  # how often files are copied to the run while it trains

_log = logging.getLogger(__name__)

Row = dict[str, float]


class Logger(Protocol):
    """One tool. It writes below a local folder, which `Curves` keeps."""

    def log(self, step: int, values: Row) -> None: ...

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """See that the packages are there.

    Raises:
        MagicIDError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise MagicIDError(
                f"training.loggers names {name!r}, and the package {PACKAGES[name]} is not installed",
                f"pip install 'magicid[{name}]' on every node, or leave it out",
            )


class Curves:
    """The loggers of one training: told of each log row, on one worker only.

    Args:
        names: of the loggers; none: nothing is done.
        place: location for their files, on any fsspec URL; a folder for each logger.
        title: what the training is, such as `ada/hpo`.
        run: what it is part of, for tools that group.
    """

    def __init__(self, names: Sequence[str], place: str, title: str, run: str) -> None:
        self._place, self._title, self._run = place, title, storage.public_name(run)
        self._loggers: dict[str, Logger] = {}
        self._names = list(names)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._kept = time.monotonic()

    def log(self, row: Row) -> None:
        """Note a row; `step` counts from 1."""
        if not self._names:
            return
        step = int(row["step"])
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="magicid-curves-")
            for name in list(self._names):
                self._try(name, lambda name=name: self._open(name, step))  # type: ignore[misc]
        values = {key: value for key, value in row.items() if key != "step"}
        for name, logger in list(self._loggers.items()):
            self._try(name, lambda logger=logger: logger.log(step, values))  # type: ignore[misc]
        if time.monotonic() - self._kept > KEPT_EVERY_S:
            self._keep()

    def _open(self, name: str, step: int) -> None:
        assert self._folder is not None
        folder = Path(self._folder.name, name)
        folder.mkdir()
        self._loggers[name] = _MAKE[name](folder, self._title, self._run, step)

    def _try(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:
            self._loggers.pop(name, None)
            _log.warning("%s: the logger %s failed and is left out: %s", self._title, name, error)

    def _keep(self) -> None:
        """Copy the files to their place."""
        self._kept = time.monotonic()
        root = Path(self._folder.name) if self._folder else Path()
        files = [file for file in sorted(root.rglob("*")) if file.is_file() and not file.is_symlink()]
        try:
            for file in files:
                storage.write_bytes(storage.join(self._place, file.relative_to(root).as_posix()), file.read_bytes())
        except (MagicIDError, OSError) as error:
            _log.warning("%s: its curves could not be kept: %s", self._title, error)

    def close(self) -> None:
        """End every logger and keep its files."""
        if self._folder is None:
            return
        for name, logger in list(self._loggers.items()):
            self._try(name, logger.close)
        self._keep()
        self._folder.cleanup()
        self._folder, self._loggers = None, {}


class _TensorBoard:
    def __init__(self, folder: Path, title: str, run: str, step: int) -> None:
        from tensorboardX import SummaryWriter

        # What an interrupted start wrote from this step on is not shown twice; files are read by the order of names.
        suffix = f".{time.time_ns()}"
        self._writer: Any = SummaryWriter(str(folder), purge_step=step, filename_suffix=suffix)

    def log(self, step: int, values: Row) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, folder: Path, title: str, run: str, step: int) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or folder.as_uri())
        experiment = self._client.get_experiment_by_name("magicid")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("magicid")
        made = self._client.create_run(experiment_id, run_name=title, tags={"magicid.run": run})
        self._run_id = made.info.run_id
        self._client.log_param(self._run_id, "training", title)
        for artifacts in folder.glob("*/*/artifacts"):  # a store without its empty folders is not one
            (artifacts / "README").write_text("No artifacts: adapters are in the run directory.\n")

    def log(self, step: int, values: Row) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, [Metric(key, value, now, step) for key, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _WandB:
    def __init__(self, folder: Path, title: str, run: str, step: int) -> None:
        import wandb

        self._run = wandb.init(
            dir=str(folder),
            project=os.environ.get("WANDB_PROJECT", "magicid"),
            name=title,
            group=run,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )

    def log(self, step: int, values: Row) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


_MAKE: dict[str, Callable[[Path, str, str, int], Logger]] = {
    "tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _WandB,
}  # fmt: skip
