"""Runs the real job as a real process, small, for the tests of this folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from magicid import adapters, storage
from magicid.run import Run, training_uri
from magicid.schema import Pair, ScoredClip

ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "repository.trained_clips": 8,
    "repository.base_clips": 8,
    "sampling.steps": 3,
    "sft.steps": 6,
    "hpo.steps": 12,
    "hpo.batch_size": 2,
    "hpo.noise_draws": 2,
    "hpo.validate_every": 12,
    "trainer.checkpoint_every": 3,
    "trainer.log_every": 1,
    "resources.slots": 1,
    "evaluation.clips": 2,
}


def command(out: Path, identities: Path, **overrides: object) -> list[str]:
    """The job's command line."""
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in overrides.items()}}
    options = [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
    return [
        sys.executable, "-m", "ray_jobs.customize", "--recipe", "face-world",
        "--identities", str(identities), "--out", str(out), *options,
    ]  # fmt: skip


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a job in a session of its own, its output in a file."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(arguments: list[str], log: Path, timeout_s: float = 900) -> int:
    """Run a job to its end; its exit code."""
    process = start(arguments, log)
    try:
        return process.wait(timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, timeout_s: float = 900
) -> None:
    """Poll until the condition holds; fails when the job ends before it does."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the job ended early:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"timed out:\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


def session_processes(leader: subprocess.Popen[bytes]) -> dict[int, str]:
    """Processes that the job started, by id, with their command lines (Linux: read from /proc)."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(entry.name)] = int(fields[1])
        except (OSError, IndexError):
            continue  # it ended while we looked

    def belongs(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == leader.pid:
                return True
        return False

    return {pid: name for pid, name in names.items() if belongs(pid)}


def clips(out: Path) -> dict[str, int]:
    """Finished clips and when each file was written (ns)."""
    return {file.name: file.stat().st_mtime_ns for file in (out / "clips").rglob("*.mp4")}


def latents(out: Path) -> dict[str, str]:
    """Hashes of the latents of the preference repository, by clip id."""
    rows = Run(str(out)).read_parts("scored", ScoredClip)
    return {row.clip_id: storage.sha256_bytes((out / str(row.latents_uri)).read_bytes()) for row in rows}


def sft_sha256(out: Path, identity_id: str) -> str:
    """Hash of the SFT adapter, which is HPO's reference."""
    return storage.sha256_bytes((out / training_uri(identity_id, "sft", adapters.WEIGHTS_NAME)).read_bytes())


def pair_ids(out: Path, identity_id: str) -> list[str]:
    """The pairs of an identity, in order."""
    return [pair.pair_id for pair in Run(str(out)).read(f"pairs/{identity_id}.parquet", Pair)]


def adapter_sha256(out: Path, identity_id: str) -> str:
    """Hash of the one published adapter."""
    (published,) = adapters.list_versions(str(out), identity_id)
    assert storage.sha256_bytes(storage.read_bytes(published.weights)) == published.sha256
    return published.sha256


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray head as `ray start --head` makes it, with token authentication; yields the submitter's environment."""
    gcs, dashboard = free_ports(2)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    # A job's `python` is looked for on the head's PATH: this one, whether its environment is activated or not.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment.pop("RAY_ADDRESS", None)
    ray = Path(sys.executable).parent / "ray"
    options = ["--num-cpus=2", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    options += [f"--port={gcs}", f"--dashboard-port={dashboard}"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [str(ray), "start", "--head", "--block", *options],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        submitter = {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        end = time.monotonic() + 120
        while subprocess.run([str(ray), "job", "list"], env=submitter, capture_output=True).returncode != 0:
            assert head.poll() is None, (folder / "head.log").read_text()[-3000:]
            assert time.monotonic() < end, "the head does not answer"
            time.sleep(1)
        yield submitter
    finally:
        head.terminate()  # `--block` ends the processes of this head, and no others
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def submit(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir . -- ...` from the checkout; waits for the job's end."""
    ray, end = Path(sys.executable).parent / "ray", time.monotonic() + 120
    while True:
        done = subprocess.run(
            [str(ray), "job", "submit", "--working-dir", ".", "--", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        if "No available agent" not in done.stderr or time.monotonic() > end:  # the head starts its parts in turn
            return done
        time.sleep(2)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
