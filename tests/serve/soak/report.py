"""The last result of each soak trial, written into docs/soak.md by the run itself: one row a trial."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import ray
import torch

FILE = Path(__file__).parents[3] / "docs/soak.md"
_HEAD = """# Soak trials of the endpoint

The last result of each trial in `tests/serve/soak`, written by the run (`make soak`): real Ray Serve in processes of
its own, the shipped face-world model, float32, HTTP over loopback. Load is the machine's one-minute average at the
start and at the end, other work included.

| trial | result | what was seen | minutes | load | cores | versions | when (UTC) |
|---|---|---|---|---|---|---|---|
"""


@contextmanager
def trial(name: str) -> Iterator[dict[str, object]]:
    """Fill what it gives with figures; the row is written at the end, also of a trial that fails."""
    figures: dict[str, object] = {}
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        yield figures
    except BaseException as error:
        _write(name, f"**failed**: {type(error).__name__}", figures, began, load)
        raise
    _write(name, "passed", figures, began, load)


def _write(name: str, result: str, figures: dict[str, object], began: float, load: float) -> None:
    seen = ", ".join(f"{what} {value}" for what, value in figures.items())
    minutes = f"{(time.monotonic() - began) / 60:.1f}"
    loads = f"{load:.0f} to {os.getloadavg()[0]:.0f}"
    versions = f"ray {ray.__version__}, torch {torch.__version__}"
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    cells = [name, result, seen, minutes, loads, str(os.cpu_count()), versions, when]
    rows = FILE.read_text().removeprefix(_HEAD).splitlines() if FILE.exists() else []
    kept = [row for row in rows if row.startswith("| ") and not row.startswith(f"| {name} |")]
    FILE.write_text(_HEAD + "\n".join(sorted([*kept, f"| {' | '.join(cells)} |"])) + "\n")
