"""An S3 server for tests: moto's, as a process of its own on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.ray_jobs.job import free_ports

BUCKET = "magicid-test"


@contextmanager
def s3_server(log: Path) -> Iterator[dict[str, str]]:
    """Start the server with one empty bucket; yields the environment in which `s3://` means it."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 60
        while True:
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, "the S3 server does not answer"
            try:
                httpx.put(f"{url}/{BUCKET}", timeout=5).raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield environment
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
