"""Logs are JSON with the request id, and say nothing that was confided; figures of tenants are bounded in number."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from magicid.errors import StorageError
from serve import logs, metrics
from serve.jobs import TenantQueue
from serve.metrics import MAX_TENANTS, OTHER, TenantMetrics
from tests.serve.endpoint import BASE, Endpoint, Server

SECRET = "a very particular prompt"


@pytest.fixture
def written() -> Iterator[Any]:
    """Sets logs up, gives what was written, and puts them back."""
    loggers = [logging.getLogger(name) for name in logs.LOGGERS]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    stream = io.StringIO()
    logs.set_up("INFO", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger, (handlers, propagate, level) in zip(loggers, before):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_request_is_one_line_with_its_id(tmp_path: Path, written: Any) -> None:
    endpoint = Endpoint(tmp_path)
    headers = {"Authorization": f"Bearer {endpoint.keys['team-a']}"}
    with Server(endpoint.app) as server, httpx.Client(base_url=server.address, trust_env=False) as client:
        body = {"prompt": SECRET, "model": f"{BASE}:ada"}
        answer = client.post("/v1/videos", json=body, headers=headers)
        client.get("/v1/videos/video_none?key=sk-1", headers=headers)
    first, second = written()
    assert first | {"time": "", "ms": 0} == {
        "time": "", "level": "INFO", "logger": "magicid.serve", "message": first["message"], "method": "POST",
        "route": "/v1/videos", "status": 200, "ms": 0, "tenant": "team-a",
        "request_id": answer.headers["x-request-id"],
    }  # fmt: skip
    assert (second["route"], second["status"]) == ("/v1/videos/{video_id}", 404)
    everything = json.dumps([first, second])
    assert SECRET not in everything
    assert endpoint.keys["team-a"] not in everything
    assert "sk-1" not in everything


def test_prompts_are_written_when_asked_for(tmp_path: Path, written: Any) -> None:
    endpoint = Endpoint(tmp_path, log_prompts=True)
    headers = {"Authorization": f"Bearer {endpoint.keys['team-a']}"}
    with Server(endpoint.app) as server, httpx.Client(base_url=server.address, trust_env=False) as client:
        answer = client.post("/v1/videos", json={"prompt": SECRET}, headers=headers)
    line = next(line for line in written() if "prompt" in line)
    assert (line["prompt"], line["job"]) == (SECRET, answer.json()["id"])
    assert line["request_id"] == answer.headers["x-request-id"]


def test_an_errors_own_text_is_written_only_when_it_is_ours(written: Any) -> None:
    log = logging.getLogger("magicid.serve")
    for error in (ValueError(f"cannot parse {SECRET}"), StorageError("the bucket is away", "wait")):
        try:
            raise error
        except Exception:
            log.exception("it failed")
    foreign, ours = written()
    assert (foreign["error"]["type"], foreign["error"]["problem"]) == ("ValueError", "")
    assert os.path.basename(__file__) in foreign["error"]["place"]
    assert SECRET not in json.dumps(foreign)
    assert ours["error"]["problem"] == "the bucket is away"


class Gauge:
    """Takes what would be exported."""

    def __init__(self, *_: object, **__: object) -> None:
        self.values: dict[str, float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags["tenant"]] = value


def test_tenants_have_labels_of_their_own_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.serve_metrics, "Gauge", Gauge)
    exported = TenantMetrics()
    exported.queues([TenantQueue("a", 3, 7.0), TenantQueue("b", 1, 9.0)])
    assert exported.waiting.values == {"a": 3, "b": 1, OTHER: 0}
    exported.queues([TenantQueue("b", 2, 10.0)])
    assert exported.waiting.values == {"a": 0, "b": 2, OTHER: 0}, "one without a queue falls to zero"
    assert exported.oldest_s.values == {"a": 0.0, "b": 10.0, OTHER: 0.0}
    many = [TenantQueue(f"t{n}", 1, float(n)) for n in range(500)]
    exported.queues(many)
    assert len(exported.waiting.values) == MAX_TENANTS + 1
    assert sum(exported.waiting.values.values()) == 500
    assert (exported.waiting.values[OTHER], exported.oldest_s.values[OTHER]) == (500 - MAX_TENANTS + 2, 499.0)
