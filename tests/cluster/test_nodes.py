"""What manifests and image ask of Ray's nodes, asked of real ones: health without a token, and leaving in peace."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from ray._private import ray_constants

from tests.cluster.manifests import CLUSTER, container, ray_clusters


def test_a_pod_that_is_stopped_finishes_its_work_takes_no_new_and_leaves() -> None:
    (group,) = (g for g in ray_clusters()["serve"]["workerGroupSpecs"] if g["groupName"] == "gpu-spot")
    *_, script = container(group["template"])["lifecycle"]["preStop"]["exec"]["command"]
    with tempfile.TemporaryDirectory(prefix="mid-") as folder:  # short: sockets lie below it
        environment = {
            **os.environ,
            "RAY_TMPDIR": folder,  # no other cluster of this machine is found, or finds this one
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        environment.pop("RAY_ADDRESS", None)
        program = [sys.executable, str(Path(__file__).parent / "node_drain.py"), script]
        done = subprocess.run(program, env=environment, check=True, stdout=subprocess.PIPE, timeout=400)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert "success" in seen.pop("health")
    assert seen == {"placed while draining": False, "work": "finished", "hook waits": True, "left when idle": True}


def test_the_health_check_asks_the_port_that_rays_agent_listens_on() -> None:
    port = ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    assert f"http://127.0.0.1:{port}/api/local_raylet_healthz" in (CLUSTER / "Dockerfile").read_text()
