"""Prometheus reads ports that pods have, alerts ask for metrics that exist, Grafana gets every dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import yaml

from magicid import ledger
from ray_jobs.metrics import ADMISSION
from ray_jobs.work import CLIPS, TRAINING
from serve.schema import CANCELLED
from tests.cluster.manifests import CLUSTER, ROOT, container, documents, ray_clusters

MONITORS = {
    d["metadata"]["name"]: d["spec"] for d in documents("monitoring/prometheus.yaml") if d["kind"] == "PodMonitor"
}


def test_monitors_read_ports_that_the_pods_have() -> None:
    cluster = ray_clusters()["serve"]
    head = {port["name"] for port in container(cluster["headGroupSpec"]["template"])["ports"]}
    worker = {port["name"] for port in container(cluster["workerGroupSpecs"][-1]["template"])["ports"]}
    read = {end["port"] for end in MONITORS["magicid-ray"]["podMetricsEndpoints"]}
    assert read == {"metrics", "as-metrics", "dash-metrics"}
    assert read <= head
    assert "metrics" in worker
    (queue,) = MONITORS["magicid-endpoint"]["podMetricsEndpoints"]
    assert queue["port"] in head
    routes = re.findall(r'add_api_route\("(/\w+)", _metrics', (ROOT / "serve/api.py").read_text())
    assert [queue["path"]] == routes


def test_monitors_choose_pods_by_labels_that_they_have() -> None:
    label = ray_clusters()["serve"]["headGroupSpec"]["template"]["metadata"]["labels"]
    kuberay = {"ray.io/node-type": "head", "ray.io/is-ray-node": "yes"}  # which the operator adds to every head
    for monitor in MONITORS.values():
        assert monitor["selector"]["matchLabels"].items() <= (label | kuberay).items()


def _rules() -> list[dict[str, str]]:
    (rules,) = (d["spec"]["groups"] for d in documents("monitoring/prometheus.yaml") if d["kind"] == "PrometheusRule")
    return [rule for group in rules for rule in group["rules"]]


def _boards() -> dict[str, list[str]]:
    """The expressions of each dashboard."""
    boards = {file.name: json.loads(file.read_text()) for file in (CLUSTER / "grafana").glob("*.json")}
    return {name: [t["expr"] for p in board["panels"] for t in p["targets"]] for name, board in boards.items()}


def _asked(expressions: Iterable[str]) -> set[str]:
    """Metrics by the names that the code gives them: Prometheus adds the endings of counters and histograms."""
    names = {name for text in expressions for name in re.findall(r"magicid_\w+", text)}
    return {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names}


def _made() -> set[str]:
    text = (ROOT / "serve/metrics.py").read_text()
    found = set(re.findall(r'"(magicid_\w+)"', text + (ROOT / "ray_jobs/metrics.py").read_text()))
    (caches,) = re.findall(r"magicid_cache_\{name\}.*?for name in (\(.*?\))", text, re.S)
    return found | {f"magicid_cache_{name}" for name in re.findall(r'"(\w+)"', caches)}


def test_dashboards_and_alerts_ask_for_metrics_that_exist() -> None:
    assert _asked(rule["expr"] for rule in _rules()) <= _made()
    for board, expressions in _boards().items():
        assert _asked(expressions) <= _made(), board


def test_every_metric_is_on_a_dashboard() -> None:
    assert _made() == _asked(text for expressions in _boards().values() for text in expressions)


def test_alerts_on_outcomes_and_states_use_words_of_the_code() -> None:
    rules = str(_rules())
    (no_failures,) = re.findall(r'outcome!~"([a-z|]+)"', rules)
    words = set(re.findall(r'"(completed|lost)"', (ROOT / "serve/worker.py").read_text())) | {CANCELLED}
    assert set(no_failures.split("|")) == words  # all other outcomes are error codes
    text = rules + str(_boards())
    assert {w for found in re.findall(r'state=~?"([a-z|]+)"', text) for w in found.split("|")} <= set(ledger.STATES)
    queues = set(re.findall(r'queue="(\w+)"', text))
    assert queues <= {TRAINING, CLIPS, ADMISSION}
    assert set(re.findall(r'stage="(\w+)"', text)) <= {TRAINING}
    assert set(re.findall(r'kind="(\w+)"', text)) == {"waiting", "held"}


def test_every_dashboard_reaches_grafana() -> None:
    boards = sorted(file.name for file in (CLUSTER / "grafana").glob("*.json"))
    (generated,) = yaml.safe_load((CLUSTER / "grafana/kustomization.yaml").read_text())["configMapGenerator"]
    assert sorted(generated["files"]) == boards
    assert generated["options"]["labels"] == {"grafana_dashboard": "1"}
    provisioned = yaml.safe_load((CLUSTER / "grafana/provisioning/dashboards.yaml").read_text())
    (provider,) = provisioned["providers"]
    assert (provisioned["apiVersion"], provider["type"]) == (1, "file")
    (source,) = yaml.safe_load((CLUSTER / "grafana/provisioning/datasources.yaml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
