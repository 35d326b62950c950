"""The manifests of cluster/ as data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).parent.parent.parent / "cluster"
ROOT = CLUSTER.parent

Manifest = dict[str, Any]


def documents(*names: str) -> list[Manifest]:
    """All documents of files below cluster/; without names, of every file with Kubernetes objects."""
    files = [CLUSTER / name for name in names] or sorted(
        file for folder in ("kuberay", "kueue", "monitoring") for file in (CLUSTER / folder).glob("*.yaml")
        if file.name != "job-patch.yaml"
    )  # fmt: skip
    loaded = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    return [json.loads(json.dumps(document)) for document in loaded]  # what YAML aliases share becomes copies


def one(name: str) -> Manifest:
    """The only document of a file below cluster/."""
    (document,) = documents(name)
    return document


def queued_job() -> Manifest:
    """job.yaml with the merge patch for Kueue."""
    patched: Manifest = merged(one("kuberay/job.yaml"), one("kueue/job-patch.yaml"))
    return patched


def merged(value: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(value) if isinstance(value, dict) else {}
    for key, change in patch.items():
        if change is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), change)
    return result


def ray_clusters() -> dict[str, Manifest]:
    """RayCluster specs: of the standing cluster, of a run, of the endpoint."""
    return {
        "cluster": one("kuberay/cluster.yaml")["spec"],
        "job": one("kuberay/job.yaml")["spec"]["rayClusterSpec"],
        "serve": one("kuberay/service.yaml")["spec"]["rayClusterConfig"],
    }


def groups(cluster: Manifest) -> list[Manifest]:
    """Head and worker groups of a RayCluster spec."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def ray_pods() -> Iterator[tuple[str, Manifest]]:
    """(name, pod template) of every pod with Ray in it, the job's submitter included."""
    for name, cluster in ray_clusters().items():
        for group in groups(cluster):
            yield f"{name} {group.get('groupName', 'head')}", group["template"]
    yield "submitter", one("kuberay/job.yaml")["spec"]["submitterPodTemplate"]


def container(template: Manifest) -> Manifest:
    """The one container of a pod template."""
    (only,) = template["spec"]["containers"]
    found: Manifest = only
    return found


def amount(quantity: str | float) -> float:
    """A Kubernetes quantity as a number: "500m" is 0.5, "2Gi" is 2147483648."""
    text = str(quantity)
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40), ("m", 1e-3)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
