"""The machines of `ray up` are those of the manifests."""

from __future__ import annotations

import shlex

import pytest
from ray.scripts.scripts import start

from tests.cluster.manifests import one, ray_clusters

AWS = one("aws.yaml")
TYPES = AWS["available_node_types"]


def test_the_head_runs_no_work_and_is_never_a_spot_machine() -> None:
    head = TYPES[AWS["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_gpu_machines_are_as_many_as_on_kubernetes() -> None:
    groups = {g["groupName"]: g["maxReplicas"] for g in ray_clusters()["cluster"]["workerGroupSpecs"]}
    assert {name: kind["max_workers"] for name, kind in TYPES.items() if name != "head"} == groups
    assert AWS["max_workers"] == sum(groups.values())
    assert TYPES["gpu-spot"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in TYPES["gpu-on-demand"]["node_config"]
    assert all(kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for kind in TYPES.values())


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_is_started_with_options_that_it_has(key: str) -> None:
    stop, begin = AWS[key]
    assert stop == "ray stop"
    words = shlex.split(begin)
    options = words[words.index("start") + 1 :]
    assert words[words.index("start") - 1] == "ray"
    parsed = start.make_context("start", [option.replace("$RAY_HEAD_IP", "10.0.0.1") for option in options]).params
    assert parsed["metrics_export_port"] == 8080
    assert words[:2] == ["cd", "/opt/magicid"]  # jobs start where Ray starts, and recipes name `models/...`
    if key.startswith("head"):
        assert (parsed["head"], parsed["num_cpus"], parsed["dashboard_host"]) == (True, 0, "127.0.0.1")


def test_no_key_is_in_the_file() -> None:
    assert AWS["file_mounts"] == {"/home/magicid/.ray/auth_token": "~/.ray/auth_token"}
