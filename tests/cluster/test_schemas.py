"""Every manifest fits the schema of its kind, and the schemas notice what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.cluster import published
from tests.cluster.manifests import Manifest, documents, one, queued_job


def _name(manifest: Manifest) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"


@pytest.mark.parametrize("manifest", documents(), ids=_name)
def test_a_manifest_fits_the_schema_of_its_kind(manifest: Manifest) -> None:
    assert published.problems(manifest) == []


def test_a_queued_job_fits_too() -> None:
    assert published.problems(queued_job()) == []


def test_the_file_for_ray_up_fits_rays_own_schema() -> None:
    assert published.autoscaler_problems(one("aws.yaml")) == []


def test_the_serve_config_fits_serves_own_schema() -> None:
    ServeDeploySchema.model_validate(yaml.safe_load(one("kuberay/service.yaml")["spec"]["serveConfigV2"]))


def _head(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return found


WRONG: list[tuple[str, Callable[[Manifest], object]]] = [
    ("kuberay/cluster.yaml", lambda m: m["spec"].update(enableInTreeAutoscaler=True)),
    ("kuberay/cluster.yaml", lambda m: m["spec"]["authOptions"].update(mode="tokens")),
    ("kuberay/cluster.yaml", lambda m: m["spec"]["workerGroupSpecs"][0].update(maxReplicas="8")),
    ("kuberay/cluster.yaml", lambda m: m["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0})),
    ("kuberay/cluster.yaml", lambda m: _head(m).update(securityContexts={})),
    ("kuberay/cluster.yaml", lambda m: _head(m)["volumeMounts"][0].pop("mountPath")),
    ("kuberay/job.yaml", lambda m: m["spec"].update(jobID="run-1")),
    ("kuberay/job.yaml", lambda m: m["spec"]["deletionStrategy"]["deletionRules"][0].update(policy="Delete")),
    ("kuberay/service.yaml", lambda m: m["spec"]["upgradeStrategy"]["clusterUpgradeOptions"].pop("gatewayClassName")),
    ("kuberay/network.yaml", lambda m: m["spec"].update(podSelektor={})),
    ("kuberay/disruption.yaml", lambda m: m["spec"].update(minAvailable=[1])),
    ("kueue/queue.yaml", lambda m: m["spec"].update(nodeLabel={})),
    ("monitoring/prometheus.yaml", lambda m: m["spec"]["podMetricsEndpoints"][0].update(interval="15 seconds")),
]


@pytest.mark.parametrize(("file", "spoil"), WRONG)
def test_a_wrong_field_or_value_is_refused(file: str, spoil: Callable[[Manifest], object]) -> None:
    manifest = copy.deepcopy(documents(file)[0])
    spoil(manifest)
    assert published.problems(manifest) != []


def test_a_wrong_field_for_ray_up_is_refused() -> None:
    assert published.autoscaler_problems({**one("aws.yaml"), "min_worker": 1}) != []
