"""Prometheus reads ports that pods have, alerts ask for metrics that exist, Grafana gets every dashboard."""

from __future__ import annotations

import re

import yaml

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


def test_alerts_ask_for_metrics_that_exist() -> None:
    (rules,) = (d["spec"]["groups"] for d in documents("monitoring/prometheus.yaml") if d["kind"] == "PrometheusRule")
    asked = {name for group in rules for rule in group["rules"] for name in re.findall(r"magicid_\w+", rule["expr"])}
    known = set(re.findall(r'"(magicid_\w+)"', (ROOT / "serve/metrics.py").read_text()))
    assert {name.removesuffix("_total") for name in asked} <= known
    (no_failures,) = re.findall(r'outcome!~"([a-z|]+)"', str(rules))
    words = set(re.findall(r'"(completed|lost)"', (ROOT / "serve/worker.py").read_text())) | {CANCELLED}
    assert set(no_failures.split("|")) == words  # all other outcomes are error codes


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
