"""The manifests fit the code, and each other."""

from __future__ import annotations

import copy
import importlib
import shlex
from typing import Any

import pytest
import typer
import yaml

import magicid
from magicid import recipe
from magicid.weights import model_folders
from ray_jobs import customize
from serve import proxy, settings
from serve.app import app
from tests.cluster.manifests import (
    CLUSTER,
    ROOT,
    Manifest,
    amount,
    container,
    documents,
    groups,
    one,
    queued_job,
    ray_clusters,
    ray_pods,
)

SERVICE = one("kuberay/service.yaml")
SERVE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
JOB = one("kuberay/job.yaml")
CLUSTERS = ray_clusters()
WEIGHTS = "/opt/magicid/models"


def _ports(template: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(template).get("ports", [])}


# One image, one Ray


def test_every_pod_and_machine_runs_the_one_image_of_this_version() -> None:
    images = {container(template)["image"] for _, template in ray_pods()} | {one("aws.yaml")["docker"]["image"]}
    assert images == {f"registry.example.com/magicid:{magicid.__version__}"}
    assert f"docker build -f cluster/Dockerfile -t {images.pop()} ." in (CLUSTER / "Dockerfile").read_text()


def test_all_clusters_name_the_ray_of_the_lock() -> None:
    locked = [line for line in (CLUSTER / "requirements.lock").read_text().splitlines() if line.startswith("ray==")]
    assert {f"ray=={cluster['rayVersion']} \\" for cluster in CLUSTERS.values()} == set(locked)


# What runs in it


def test_the_run_is_one_that_the_job_accepts() -> None:
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", customize.__name__]
    command = typer.main.get_command(customize.app)
    context = command.make_context("customize", words[3:])
    loaded = recipe.load(context.params["recipe_name"], recipe.parse_overrides(context.args))
    assert loaded.name in recipe.shipped()
    assert JOB["metadata"]["name"] == JOB["spec"]["jobId"] == context.params["out"].rsplit("/", 1)[-1]


def test_the_service_serves_what_serve_config_says() -> None:
    assert yaml.safe_load((ROOT / "serve/config.yaml").read_text()) == SERVE
    assert SERVICE["spec"]["serveConfigV2"] == (ROOT / "serve/config.yaml").read_text()  # its comments too
    (application,) = SERVE["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is app
    loaded = settings.load(application["args"])
    assert loaded.recipe in recipe.shipped()


def test_weights_are_mounted_where_recipes_look_for_them() -> None:
    named = {folder for name in recipe.shipped() for folder in model_folders(recipe.load(name))}
    relative = {folder for folder in named if not folder.startswith("world:")}
    assert relative
    # Relative to the folder that the image starts Ray in: tests/cluster/test_image.py
    assert all(folder.startswith("models/") for folder in relative)
    for name, template in ray_pods():
        if name != "submitter":
            (mount,) = container(template)["volumeMounts"]
            assert (mount["mountPath"], mount["readOnly"]) == (WEIGHTS, True), name
            (volume,) = template["spec"]["volumes"]
            assert volume["name"] == mount["name"]
    (claim,) = (d for d in documents("kuberay/namespace.yaml") if d["kind"] == "PersistentVolumeClaim")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert f":{WEIGHTS}:ro" in " ".join(one("aws.yaml")["docker"]["run_options"])


@pytest.mark.parametrize("name", ["hunyuan-480p", "hunyuan-paper", "wan-480p"])
@pytest.mark.parametrize("kind", ["cluster", "job"])
def test_a_run_fits_the_cluster_at_its_largest(kind: str, name: str) -> None:
    resources = recipe.load(name).resources
    machines = [group for group in CLUSTERS[kind]["workerGroupSpecs"] if group["groupName"].startswith("gpu-")]
    sizes = [container(group["template"])["resources"]["requests"] for group in machines]
    cpus = sum(g["maxReplicas"] * amount(s["cpu"]) for g, s in zip(machines, sizes, strict=True))
    gpus = sum(g["maxReplicas"] * amount(s["nvidia.com/gpu"]) for g, s in zip(machines, sizes, strict=True))
    pools = [resources.generator, resources.identity, resources.motion, resources.semantics]
    pools += [resources.identity]  # evaluation has faces of its own
    trainers = resources.slots * resources.workers_per_slot  # one identity trains while others are generated and scored
    assert gpus >= sum(pool.max_size * pool.gpus for pool in pools) + trainers * resources.worker_gpus
    # more CPUs than that: pools that take all starve the read tasks
    assert cpus > sum(pool.max_size * pool.cpus for pool in pools) + trainers * resources.worker_cpus
    for size in sizes:  # every actor fits one machine
        assert all(p.cpus <= amount(size["cpu"]) and p.gpus <= amount(size["nvidia.com/gpu"]) for p in pools)


def test_the_endpoint_fits_its_cluster() -> None:
    loaded = settings.load(SERVE["applications"][0]["args"])
    sizes = {g["groupName"]: container(g["template"])["resources"]["requests"] for g in groups(CLUSTERS["serve"])[1:]}
    replicas = {g["groupName"]: g["maxReplicas"] for g in CLUSTERS["serve"]["workerGroupSpecs"]}
    gpus = sum(replicas[name] * amount(size.get("nvidia.com/gpu", 0)) for name, size in sizes.items())
    assert gpus >= loaded.max_replicas * loaded.replica_gpus
    assert all(amount(s["cpu"]) >= loaded.replica_cpus for n, s in sizes.items() if n.startswith("gpu-"))
    deployment_cpus = (
        0.2 + 0.1
    )  # API and dispatcher, serve/app.py: the door holds both, so no GPU machine waits for a video
    assert amount(sizes["door"]["cpu"]) >= deployment_cpus
    (door,) = (g for g in CLUSTERS["serve"]["workerGroupSpecs"] if g["groupName"] == "door")
    assert door["minReplicas"] >= 1


# Ports


def test_ports_are_those_of_the_code() -> None:
    for name, template in ray_pods():
        ports = _ports(template)
        if name == "submitter":
            assert ports == {}
            continue
        expected = {"metrics": 8080}
        if name.endswith("head"):
            expected |= {"gcs-server": 6379, "dashboard": 8265, "as-metrics": 44217, "dash-metrics": 44227}
        if name.startswith("serve"):
            expected |= {"serve": SERVE["http_options"]["port"]}
        assert ports == expected, name


def test_the_network_lets_in_what_has_a_port_and_nothing_else() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in documents("kuberay/network.yaml")}
    assert policies["deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}

    def opened(name: str, direction: str = "ingress") -> set[int]:
        return {port["port"] for rule in policies[name][direction] for port in rule["ports"]}

    head = _ports(CLUSTERS["serve"]["headGroupSpec"]["template"])
    assert opened("dashboard") == opened("submitter", "egress") == {head["dashboard"]}
    assert opened("endpoint") == {head["serve"]}
    assert head["serve"] in opened("gateway", "egress")
    assert opened("metrics") == {head[name] for name in ("metrics", "as-metrics", "dash-metrics", "serve")}
    assert opened("outside", "egress") == {53, 443, 6443, 5432, 4318}
    blocked = [
        peer["ipBlock"]["except"] for rule in policies["outside"]["egress"] for peer in rule["to"] if "ipBlock" in peer
    ]
    assert blocked == [["169.254.169.254/32"]]


# Ends


def test_no_end_is_shorter_than_a_video() -> None:
    shutdown_s = settings.load(SERVE["applications"][0]["args"]).shutdown_s
    assert SERVICE["spec"]["rayClusterDeletionDelaySeconds"] > shutdown_s
    for group in CLUSTERS["serve"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        if group["groupName"].startswith("gpu-"):
            assert spec["terminationGracePeriodSeconds"] > _drain_s(group["template"]) > shutdown_s


@pytest.mark.parametrize("kind", ["cluster", "job"])
def test_gpu_machines_of_a_run_drain_within_the_notice_of_a_spot_machine(kind: str) -> None:
    for group in CLUSTERS[kind]["workerGroupSpecs"]:
        assert _drain_s(group["template"]) < group["template"]["spec"]["terminationGracePeriodSeconds"] <= 120


def _drain_s(template: Manifest) -> int:
    """Seconds that a pod's work gets before it is stopped: the deadline that Ray is told, and the wait."""
    shell, flag, script = container(template)["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("bash", "-c")
    words = shlex.split(script)
    deadline, wait = words[words.index("--deadline-remaining-seconds") + 1], words[words.index("sleep") + 1]
    assert deadline == wait
    return int(wait)


def test_a_finished_run_is_removed_in_an_order_that_kuberay_accepts() -> None:
    assert not JOB["spec"].get("shutdownAfterJobFinishes")  # not beside deletion rules
    after: dict[str, dict[str, int]] = {}
    for rule in JOB["spec"]["deletionStrategy"]["deletionRules"]:
        assert rule["policy"] != "DeleteWorkers"  # not with an autoscaler
        (state,) = (value for key, value in rule["condition"].items() if key != "ttlSeconds")
        assert rule["policy"] not in after.setdefault(state, {})
        after[state][rule["policy"]] = rule["condition"]["ttlSeconds"]
    assert set(after) == {"SUCCEEDED", "FAILED", "Failed"}
    assert all(ttls["DeleteCluster"] <= ttls["DeleteSelf"] for ttls in after.values())


def test_an_upgrade_moves_in_steps_that_kuberay_accepts() -> None:
    strategy = SERVICE["spec"]["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    options = strategy["clusterUpgradeOptions"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    assert CLUSTERS["serve"]["enableInTreeAutoscaling"] is True  # incremental upgrades need it


# Safety


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_cluster_asks_for_a_token_and_keeps_its_head_for_itself(kind: str) -> None:
    cluster = CLUSTERS[kind]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "magicid-ray-token"}
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    capacity = {g.get("groupName", "head"): g["template"]["spec"]["nodeSelector"] for g in groups(cluster)}
    label = "karpenter.sh/capacity-type"
    assert capacity["head"] == {label: "on-demand"}
    assert capacity["gpu-spot"] == {label: "spot"}
    assert capacity["gpu-on-demand"] == {label: "on-demand"}
    by_name = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    assert by_name["gpu-spot"]["priority"] > by_name["gpu-on-demand"]["priority"]
    assert all("restartPolicy" not in g["template"]["spec"] for g in groups(cluster))  # autoscaler v2 replaces pods


def test_no_pod_has_rights_that_it_does_not_need() -> None:
    for name, template in ray_pods():
        spec, only = template["spec"], container(template)
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert only["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name
        assert spec["automountServiceAccountToken"] is name.endswith("head"), name  # the autoscaler beside the head
        assert spec["serviceAccountName"] == "magicid", name
        assert only["resources"]["requests"] == only["resources"]["limits"], name
    (namespace,) = (d for d in documents("kuberay/namespace.yaml") if d["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_secrets_are_named_and_never_written() -> None:
    assert all(d["kind"] != "Secret" for d in documents())
    for name, template in ray_pods():
        only = container(template)
        written = {v["name"]: v["value"] for v in only.get("env", []) if "value" in v}
        assert written == ({proxy.VARIABLE: proxy.CALLBACK} if name.startswith("serve") else {}), name  # and no secret
        assert [s["secretRef"]["name"] for s in only.get("envFrom", [])] == (
            [] if name == "submitter" else ["magicid-storage"]
        )
        rest = [v for v in only.get("env", []) if v["name"] not in written]
        database = {v["name"]: v["valueFrom"]["secretKeyRef"]["name"] for v in rest}
        assert database == ({"PGPASSWORD": "magicid-database"} if name.startswith("serve") else {}), name
    assert (
        ":" not in SERVE["applications"][0]["args"]["database"].split("//")[1].split("@")[0]
    )  # no password in the URL


def test_everything_lives_in_one_namespace() -> None:
    without = {"Namespace", "ResourceFlavor", "ClusterQueue"}  # kinds of the whole cluster
    assert {d["metadata"].get("namespace") for d in documents() if d["kind"] not in without} == {"magicid"}


# One cluster, three times


def test_run_and_endpoint_have_the_standing_clusters_machines_but_for_what_is_said() -> None:
    standing = CLUSTERS["cluster"]

    job = copy.deepcopy(CLUSTERS["job"])
    _relabel(job, "cluster")
    by_name = {g["groupName"]: g for g in job["workerGroupSpecs"]}
    by_name["gpu-on-demand"].update(replicas=0, minReplicas=0)
    assert job == standing

    serve = copy.deepcopy(CLUSTERS["serve"])
    _relabel(serve, "cluster")
    serve["workerGroupSpecs"] = [g for g in serve["workerGroupSpecs"] if g["groupName"] != "door"]
    for group, same in zip(groups(serve), groups(standing), strict=True):
        only = container(group["template"])
        only.pop("env")
        only["ports"] = [port for port in only["ports"] if port["name"] != "serve"]
        if "groupName" in group:
            group["maxReplicas"] = same["maxReplicas"]
            group["template"]["spec"]["terminationGracePeriodSeconds"] = 120
            only["lifecycle"] = container(same["template"])["lifecycle"]
    assert serve == standing


def _relabel(cluster: Manifest, component: str) -> None:
    for group in groups(cluster):
        group["template"]["metadata"]["labels"]["app.kubernetes.io/component"] = component


def test_every_head_has_a_budget_of_its_own() -> None:
    selectors = [d["spec"]["selector"]["matchLabels"] for d in documents("kuberay/disruption.yaml")]
    for cluster in CLUSTERS.values():
        label = cluster["headGroupSpec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        assert {"ray.io/node-type": "head", "app.kubernetes.io/component": label} in selectors


def test_no_two_head_services_have_one_name() -> None:
    names = [d["metadata"]["name"] for d in documents() if d["apiVersion"] == "ray.io/v1"]
    assert len(set(names)) == len(names) == 3  # KubeRay makes NAME-head-svc of each
    assert all(len(name) <= 40 for name in names)  # a RayJob's and RayService's cluster add a suffix


# The queue


def test_a_queued_run_is_one_that_kueue_admits() -> None:
    job = queued_job()
    queues = {d["kind"]: d for d in documents("kueue/queue.yaml")}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queues["LocalQueue"]["metadata"]["name"]
    assert queues["LocalQueue"]["spec"]["clusterQueue"] == queues["ClusterQueue"]["metadata"]["name"]
    assert job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"  # or no autoscaler
    assert job["spec"]["suspend"] is job["spec"]["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in job["spec"]
    changed = {"suspend", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "deletionStrategy"}
    assert {k: v for k, v in job["spec"].items() if k not in changed} == {
        k: v for k, v in one("kuberay/job.yaml")["spec"].items() if k not in changed
    }


def test_two_runs_at_their_largest_fit_the_quota() -> None:
    flavors = {
        d["metadata"]["name"]: d["spec"]["nodeLabels"]
        for d in documents("kueue/queue.yaml")
        if d["kind"] == "ResourceFlavor"
    }
    (queue,) = (d for d in documents("kueue/queue.yaml") if d["kind"] == "ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]
    wanted: dict[str, dict[str, float]] = {name: {} for name in flavors}

    def ask(selector: dict[str, str], requests: dict[str, Any], count: int) -> None:
        (flavor,) = (name for name, labels in flavors.items() if labels == selector)
        for resource, quantity in requests.items():
            wanted[flavor][resource] = wanted[flavor].get(resource, 0) + 2 * count * amount(quantity)

    cluster = CLUSTERS["job"]
    for each in groups(cluster):
        selector = each["template"]["spec"]["nodeSelector"]
        ask(selector, container(each["template"])["resources"]["requests"], each.get("maxReplicas", 1))
    submitter = JOB["spec"]["submitterPodTemplate"]
    ask(submitter["spec"]["nodeSelector"], container(submitter)["resources"]["requests"], 1)
    ask({"karpenter.sh/capacity-type": "on-demand"}, cluster["autoscalerOptions"]["resources"]["requests"], 1)
    quota = {
        flavor["name"]: {r["name"]: amount(r["nominalQuota"]) for r in flavor["resources"]}
        for flavor in group["flavors"]
    }
    for flavor, resources in wanted.items():
        assert set(resources) <= set(group["coveredResources"])
        assert all(quota[flavor][resource] >= needed for resource, needed in resources.items()), (flavor, resources)
