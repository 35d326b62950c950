"""Spans of identities: a tree for each, with tries, ends and errors; nothing at all when it is off."""

from __future__ import annotations

import builtins
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from magicid.errors import MagicIDError
from ray_jobs import tracing
from ray_jobs.tracing import Traces


@pytest.fixture
def spans() -> tuple[Traces, InMemorySpanExporter]:
    kept = InMemorySpanExporter()
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(kept))
    return Traces("s3://key:secret@bucket/run", made), kept


def test_an_identity_is_a_tree_of_its_stages(spans: tuple[Traces, InMemorySpanExporter]) -> None:
    traces, kept = spans
    traces.begin("ada", "studio")
    for stage in ("check", "sft", "sft", "sft", "hpo"):
        traces.stage("ada", stage)
    traces.attempts("ada", "hpo", 2)
    traces.attempts("ada", "sft", 9)  # which is over
    traces.end("ada", "done", adapter="v1")
    *stages, root = kept.get_finished_spans()
    assert [span.name for span in stages] == ["check", "sft", "hpo"]
    assert root.name == "identity"
    assert root.attributes == {
        "magicid.run": "s3://bucket/run", "magicid.identity": "ada", "magicid.owner": "studio",
        "magicid.state": "done", "magicid.adapter": "v1",
    }  # fmt: skip
    for span in stages:
        assert span.parent is not None
        assert root.context is not None
        assert (span.parent.span_id, span.context.trace_id) == (root.context.span_id, root.context.trace_id)
    assert stages[2].attributes == {"magicid.stage": "hpo", "magicid.attempts": 2}
    ends = [span.end_time for span in (*stages, root)]
    assert ends == sorted(ends)  # type: ignore[type-var]
    assert all(span.status.is_ok or span.status.is_unset for span in (*stages, root))


def test_a_failure_marks_its_stage_and_the_whole(spans: tuple[Traces, InMemorySpanExporter]) -> None:
    traces, kept = spans
    traces.begin("ada", "studio")
    traces.begin("bo", "studio")
    traces.stage("ada", "check")
    traces.stage("bo", "check")
    traces.stage("ada", "sft")
    traces.end("ada", "failed", "out of luck")
    check, sft, root = kept.get_finished_spans()
    assert check.status.is_unset
    assert (sft.status.description, root.status.description) == ("out of luck", "out of luck")
    assert root.attributes is not None
    assert root.attributes["magicid.state"] == "failed"
    traces.close()  # the driver stops: bo is open
    states = {s.attributes["magicid.identity"]: s.attributes["magicid.state"] for s in kept.get_finished_spans()
              if s.attributes and "magicid.identity" in s.attributes}  # fmt: skip
    assert states == {"ada": "failed", "bo": "interrupted"}
    traces.end("bo", "done")  # its coroutine ends later
    assert len(kept.get_finished_spans()) == 5


def test_off_unless_the_standard_variable_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing._SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert tracing.provider() is None
    traces = Traces("/run", None)
    traces.begin("ada", "t")
    traces.stage("ada", "sft")
    traces.attempts("ada", "sft", 1)
    traces.end("ada", "failed", "x")
    traces.close()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.provider() is None


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("opentelemetry.exporter.otlp"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return whole(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(MagicIDError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces.*magicid\[tracing\]"):
        tracing.provider()


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `tracing` is not installed")
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    traces = Traces("/run", tracing.provider())
    traces.begin("ada", "studio")
    traces.stage("ada", "sft")
    traces.end("ada", "done")
    traces.close()
    server.shutdown()
    server.server_close()
    assert [path for path, _ in got] == ["/v1/traces"]
    assert b"magicid.identity" in got[0][1]
    assert b"sft" in got[0][1]
