"""A process of its own: two Ray nodes behind a token; one is drained by a pod's preStop script.

Prints what was seen, as JSON.

python node_drain.py SCRIPT
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.cluster_utils import Cluster

T = TypeVar("T")


@ray.remote(num_cpus=0.5)
class Work:
    def run(self, end: str) -> str:
        while not os.path.exists(end):
            time.sleep(0.1)
        return "finished"


def main() -> None:
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet(free_port())}))
    port = free_port()
    node = patiently(lambda: cluster.add_node(num_cpus=1, **quiet(port)))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    seen: dict[str, Any] = {"health": health(port)}
    end = os.path.join(os.environ["RAY_TMPDIR"], "end")
    busy = Work.remote()
    ray.get(busy.__ray_ready__.remote())
    running = busy.run.remote(end)
    # In a pod this node is the only one; here it must be named.
    script = sys.argv[1].replace("drain-node", f"drain-node --node-id {node.node_id}")
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    hook = subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True, stdout=sys.stderr)
    try:
        wait_until(lambda: any(line.startswith(b"sleep") for line in commands(hook.pid)))  # Ray has been told
        seen["placed while draining"] = bool(ray.wait([Work.remote().__ray_ready__.remote()], timeout=3)[0])
        seen["hook waits"] = hook.poll() is None
        open(end, "w").close()
        seen["work"] = ray.get(running)
        ray.kill(busy)
        wait_until(lambda: node.node_id not in {each["NodeID"] for each in ray.nodes() if each["Alive"]})
        seen["left when idle"] = True
    finally:
        os.killpg(hook.pid, signal.SIGKILL)
    print(json.dumps(seen), flush=True)
    ray.shutdown()
    cluster.shutdown()


def quiet(port: int) -> dict[str, Any]:
    return {"include_dashboard": False, "dashboard_agent_listen_port": port}


def patiently(start: Callable[[], T]) -> T:
    """Ray gives a node 30 s to start, which a busy machine may miss."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:
            print(error, file=sys.stderr)
    return start()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def health(port: int) -> str:
    """What the node's agent answers to the image's health check, asked without a token."""
    for _ in range(60):
        try:
            return (
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/local_raylet_healthz", timeout=5).read().decode()
            )
        except OSError:
            time.sleep(0.5)
    return "no answer"


def commands(group: int) -> list[bytes]:
    """The command lines of a process group."""
    return subprocess.run(["ps", "-o", "args=", "-g", str(group)], capture_output=True).stdout.splitlines()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.2)


if __name__ == "__main__":
    main()
