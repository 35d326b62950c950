"""What the endpoint adds to a status poll: GET /v1/videos/{id} with 1,000 open videos, through Ray Serve and without.

    python benchmarks/bench_api.py [--polls 2000] [--open 1000]

Three rows: the app alone in this process (no network, no Serve); through Ray Serve's proxy while no engine runs; and
the same while a replica denoises, which takes a core of its own. One client on a kept-alive connection, ids drawn at
random; the client's own time is in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from magicid.storage import sha256_json
from serve.api import create_api
from serve.parts import open_jobs, open_parts, open_tenants
from serve.schema import Target, VideoRequest
from serve.settings import ServeSettings, load

KEY = "bench-key-0123456789-0123456789-0123456789"
PORT = 8123
GOAL_MS = 20
WARM_UP = 200


def fill(settings: ServeSettings, count: int) -> list[str]:
    """Open videos that take very long; returns their ids."""
    jobs = open_jobs(settings)
    found = []
    for number in range(count):
        request = VideoRequest("a person nods", 13, 48, 48, 8, 100_000, 6.0, number)
        target, key = Target("face-world"), sha256_json(number)
        job, _ = jobs.create("local", target, request, request_id="r", dedupe_key=key, dedupe_s=math.inf)
        found.append(job.id)
    return found


def add_tenant(settings: ServeSettings) -> None:
    open_tenants(settings).add("local", key=KEY, requests_per_minute=10**6)


async def poll_app(settings: ServeSettings, ids: list[str], polls: int) -> tuple[list[float], float]:
    """Milliseconds of each poll of the app itself, and the mean of this process's CPU time, which load hardly moves."""
    transport = httpx.ASGITransport(app=create_api(settings, open_parts(settings)))
    took = []
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://bench", headers=headers) as client:
        for number in range(WARM_UP + polls):
            if number == WARM_UP:
                cpu_began = time.process_time()
            began = time.perf_counter()
            answer = await client.get(f"/v1/videos/{random.choice(ids)}")
            took.append(1000 * (time.perf_counter() - began))
            assert answer.status_code == 200, answer.text
    return took[WARM_UP:], 1000 * (time.process_time() - cpu_began) / polls


def poll_endpoint(ids: list[str], polls: int) -> list[float]:
    """Milliseconds of each poll through the proxy."""
    connection, took = http.client.HTTPConnection("127.0.0.1", PORT), []
    for _ in range(WARM_UP + polls):
        began = time.perf_counter()
        connection.request("GET", f"/v1/videos/{random.choice(ids)}", headers={"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        body = answer.read()
        took.append(1000 * (time.perf_counter() - began))
        assert answer.status == 200, body
    return took[WARM_UP:]


@contextmanager
def served(values: dict[str, str]) -> Iterator[None]:
    """The endpoint as `make serve` starts it."""
    environment = {**os.environ, "MAGICID_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.local", "--port", str(PORT), *(f"{k}={v}" for k, v in values.items())],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ctrl-C ends it" in line:
                break
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def show(name: str, took: list[float]) -> None:
    median, p99 = np.quantile(took, 0.5), np.quantile(took, 0.99)
    load_average = os.getloadavg()[0]
    print(f"  {name:<34} {median:6.1f} ms   p99 {p99:6.1f} ms   load {load_average:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--polls", type=int, default=2000)
    parser.add_argument("--open", type=int, default=1000)
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run").mkdir()
        values = {"data": folder, "adapters": f"{folder}/run", "max_queued": "100000", "min_replicas": "0"}
        settings = load(values)
        ids = fill(settings, options.open)
        add_tenant(settings)
        print(
            f"GET /v1/videos/{{id}}, {options.open} open videos, {options.polls} polls, {os.cpu_count()} cores, SQLite"
        )
        took, cpu_ms = asyncio.run(poll_app(settings, ids, options.polls))
        show("the app alone", took)
        print(f"  CPU time a poll, client included   {cpu_ms:6.2f} ms")
        for name, more in (
            ("through Ray Serve", {"replica_cpus": "1000"}),  # none fits, so nothing is denoised
            ("through Ray Serve, denoising", {}),
        ):
            with served({**values, **more}):
                add_rate(settings)
                if not more:
                    wait_until_busy(settings)
                show(name, poll_endpoint(ids, options.polls))
    print(f"goal: p99 below {GOAL_MS} ms")


def add_rate(settings: ServeSettings) -> None:
    """`serve.local` has made its tenant anew."""
    tenants = open_tenants(settings)
    tenants.remove("local")
    add_tenant(settings)


def wait_until_busy(settings: ServeSettings) -> None:
    while open_jobs(settings).open_work().in_progress == 0:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
