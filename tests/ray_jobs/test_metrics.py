"""The fleet's figures as Prometheus reads them from a Ray node."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from magicid import recipe
from ray_jobs import metrics
from tests.ray_jobs.job import ROOT, free_ports

SCRIPT = """
import sys, time, urllib.request
import ray
from magicid import recipe
from ray_jobs.metrics import FleetMetrics

port, out = int(sys.argv[1]), sys.argv[2]
ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=port, logging_level="ERROR")
now = [0.0]
found = FleetMetrics(recipe.load("face-world", {"resources.slots": 2, "resources.motion.gpus": 0.5}), lambda: now[0])
found.spent("ada", {"GenerateClips": 30.0, "ScoreMotion": 2.0, "ScoreIdentity": 0.0})
found.spent(None, {"GenerateClips": 5.0})
found.spent("ada", {"sft": 50.0})
found.tried("sft", 2)
now[0] = 100.0
found.training(1)
assert found.due
found.report({"done": 3, "waiting": 1}, {"sft": 1}, {
    "training": (2, 1, {"t": 40.0, "u": 3.0}), "clips": (0, 0, {}), "admission": (0, 1, {}),
})
assert not found.due
found.report({"done": 4}, {}, {"training": (0, 1, {"u": 5.0})})
text = ""
for _ in range(120):
    time.sleep(0.5)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        continue
    if "magicid_fleet_device_seconds" in text and "magicid_fleet_queue_age" in text:
        break
open(out, "w").write(text)
"""


def test_prometheus_reads_every_figure(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    out = tmp_path / "metrics"
    subprocess.run([sys.executable, "-c", SCRIPT, str(port), str(out)], check=True, cwd=ROOT, timeout=300)
    values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for line in out.read_text().splitlines():
        if match := re.match(r"ray_(magicid_fleet_\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match.group(2)))
            own = {k: v for k, v in labels.items() if k in ("state", "stage", "queue", "kind", "owner", "identity")}
            values[match.group(1), frozenset(own.items())] = float(match.group(3))

    def value(name: str, **labels: str) -> float:
        return values[f"magicid_fleet_{name}", frozenset(labels.items())]

    assert value("identities", state="done") == 4
    assert value("identities", state="waiting") == 0  # the newest report counts
    assert value("under_way", stage="sft") == 0
    assert value("busy_fraction", stage="GenerateClips") == pytest.approx(35 / (2 * 100))
    assert value("busy_fraction", stage="ScoreMotion") == pytest.approx(2 / 100)
    assert value("busy_fraction", stage="training") == pytest.approx(1 * 100 / (2 * 100))
    assert value("queue_tasks", queue="training", kind="waiting") == 0
    assert value("queue_tasks", queue="training", kind="held") == 1
    assert value("queue_age_seconds", queue="training", owner="u") == 5
    assert value("queue_age_seconds", queue="training", owner="t") == 0  # it waits no longer
    assert value("attempts_total", stage="sft") == 2
    assert value("device_seconds_total", stage="GenerateClips", identity="ada") == 30
    assert value("device_seconds_total", stage="GenerateClips", identity="shared") == 5
    assert value("device_seconds_total", stage="ScoreMotion", identity="ada") == 2 * 0.5
    assert value("device_seconds_total", stage="sft", identity="ada") == 50
    told = {name.removeprefix("magicid_fleet_").removesuffix("_total") for name, _ in values}
    assert told == documented()


def documented() -> set[str]:
    return set(re.findall(r"^\| magicid_fleet_(\w+)", str(metrics.__doc__), re.M))


def test_busy_forgets_what_is_long_ago() -> None:
    now = [0.0]
    busy = metrics.Busy(2, lambda: now[0])
    assert busy.fraction() == 0
    now[0] = 10.0
    busy.add(5.0)
    assert busy.fraction() == 5 / 20
    busy.add(100.0)
    assert busy.fraction() == 1
    now[0] = 1000.0
    busy.add(60.0)
    assert busy.fraction() == 60 / (2 * metrics.WINDOW_S)


def test_few_identities_have_a_label_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.ray_metrics, "Gauge", lambda *_: None)
    monkeypatch.setattr(metrics.ray_metrics, "Counter", lambda *_: None)
    found = metrics.FleetMetrics(recipe.load("face-world"))
    labels = [found.label(f"p{number}") for number in range(metrics.IDENTITIES + 5)]
    assert labels == [f"p{number}" for number in range(metrics.IDENTITIES)] + ["others"] * 5
    assert (found.label("p7"), found.label(None)) == ("p7", "shared")
