"""A Ray cluster of processes of its own on loopback, of which every process can be found, stopped and killed.

Nodes are started with `ray start`, as on machines: a head without CPUs, and workers. A node is a session of processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from tests.ray_jobs.job import free_ports

START_S = 240  # a busy machine
# Deaths are seen within seconds: defaults are for networks, and a trial would only wait for them.
QUICK = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_gcs_server_request_timeout_seconds": "10",
}
HEALTH_CHECK_S = 20  # a node that is silent for longer is dead to the cluster


class Node:
    """One `ray start --block` and all that comes of it."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._arguments, self._environment = arguments, environment
        self._start()

    def _start(self) -> None:
        ray = Path(sys.executable).parent / "ray"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(ray), "start", "--block", "--disable-usage-stats", *self._arguments],
                env=self._environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_until_up(self) -> None:
        """Return when it has joined. Ray gives a node 30 s to start, which a busy machine may miss: then again."""
        end = time.monotonic() + START_S
        while "Ray runtime started" not in self.log.read_text():
            assert time.monotonic() < end, f"a node does not start: {self.log.read_text()[-3000:]}"
            if not self.alive:
                self.kill()
                self._start()
            time.sleep(0.2)

    @property
    def alive(self) -> bool:
        """Whether its `ray start` still blocks."""
        return self.process.poll() is None

    def processes(self) -> dict[int, str]:
        """Its processes with their command lines."""
        return session(self.process.pid)

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        for pid in self.processes():
            send(pid, number)

    def kill(self) -> None:
        """kill -9 of all its processes, as a machine that loses power."""
        end = time.monotonic() + 60
        while self.processes() and time.monotonic() < end:
            self.signal(signal.SIGKILL)
            self.process.poll()
            time.sleep(0.1)
        self.process.wait(60)


class Cluster:
    """A head and workers. `environment` is what a driver needs to join.

    Args:
        more: environment of every process besides, such as the credentials of a store.
        dashboard: also start what takes `ray job submit`, at `dashboard_url`.
    """

    def __init__(self, folder: Path, more: dict[str, str], workers: int = 2, dashboard: bool = False) -> None:
        self.folder, self._more, self._workers, self._dashboard = folder, more, workers, dashboard
        self.dashboard_url = ""
        self._starts = 0
        self.head: Node | None = None
        self.workers: list[Node] = []
        self._temporary = ""
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        """Start what is not there: workers where the head lives, everything where it does not."""
        if self.head is None or not self.head.alive:
            self.stop()
            self._temporary = tempfile.mkdtemp(prefix="mc-")  # short: sockets lie in it
            port, client, dashboard = free_ports(3)
            token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
            self.environment = {**os.environ, **self._more, **QUICK, **token, "RAY_ADDRESS": f"127.0.0.1:{port}"}
            options = [
                "--head",
                f"--port={port}",
                "--num-cpus=0",
                f"--include-dashboard={str(self._dashboard).lower()}",
                f"--ray-client-server-port={client}",
            ]
            if self._dashboard:
                options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
                self.dashboard_url = f"http://127.0.0.1:{dashboard}"
            self.head = self._node([*options, f"--temp-dir={self._temporary}"])
            self.head.wait_until_up()
        self.workers = [node for node in self.workers if node.alive]
        new = []
        for _ in range(self._workers - len(self.workers)):
            new.append(self._node([f"--address={self.environment['RAY_ADDRESS']}", "--num-cpus=2"]))
        for node in new:
            node.wait_until_up()
        self.workers += new

    def _node(self, options: list[str]) -> Node:
        (port,) = free_ports(1)
        self._starts += 1
        common = ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={port}"]
        memory = "--object-store-memory=100000000"
        # RAY_ADDRESS too: Ray Train's cleaner looks for a cluster by itself, and finds any that is on this machine.
        return Node([*options, *common, memory], self.environment, self.folder / f"node-{self._starts}.log")

    def nodes(self) -> list[Node]:
        """All nodes, the head first."""
        return [*([self.head] if self.head else []), *self.workers]

    def stop(self) -> None:
        """kill -9 of everything."""
        for node in reversed(self.nodes()):
            node.kill()
        self.head, self.workers = None, []
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)


def session(leader: int) -> dict[int, str]:
    """The processes of a session, with their command lines (Linux: read from /proc)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, of = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(of) == leader and state != "Z":
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = line.decode(errors="replace").strip()
        except (OSError, ValueError):
            continue  # it ended while we looked
    return found


def send(pid: int, number: int) -> None:
    """Send a signal; one that is gone gets none."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
