"""OpenTelemetry: one trace per identity and start of the job, a span for each of its stages. Off by default.

On where OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) is set, as for any instrumented program.
The exporter comes with `pip install 'magicid[tracing]'`. OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES and OTEL_TRACES_SAMPLER are heeded. Spans go by HTTP (protobuf).

    identity                      magicid.run, magicid.identity, magicid.owner, magicid.state, magicid.adapter
    ├── check, photo clips, sft   magicid.stage, magicid.attempts
    └── ...
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from magicid import storage
from magicid.errors import MagicIDError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_SWITCHES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Traces:
    """The spans of the identities under way.

    Args:
        provider: where spans go; None: nowhere, and every method does nothing.
    """

    def __init__(self, run: str, provider: TracerProvider | None) -> None:
        self._run, self._provider = storage.public_name(run), provider
        self._tracer = provider.get_tracer("magicid") if provider else None
        self._roots: dict[str, Span] = {}
        self._stages: dict[str, tuple[str, Span]] = {}

    def begin(self, identity_id: str, owner: str) -> None:
        """An identity begins."""
        if self._tracer is None:
            return
        attributes = {"magicid.run": self._run, "magicid.identity": identity_id, "magicid.owner": owner}
        self._roots[identity_id] = self._tracer.start_span("identity", attributes=attributes)

    def stage(self, identity_id: str, stage: str) -> None:
        """It is in a stage now; called again and again, a new span begins when the stage is another."""
        root, known = self._roots.get(identity_id), self._stages.get(identity_id)
        if self._tracer is None or root is None or (known is not None and known[0] == stage):
            return
        from opentelemetry.trace import set_span_in_context

        self._end_stage(identity_id)
        span = self._tracer.start_span(stage, set_span_in_context(root), attributes={"magicid.stage": stage})
        self._stages[identity_id] = (stage, span)

    def attempts(self, identity_id: str, stage: str, attempts: int) -> None:
        """How often its stage was tried."""
        name, span = self._stages.get(identity_id, ("", None))
        if span is not None and name == stage:
            span.set_attribute("magicid.attempts", attempts)

    def end(self, identity_id: str, state: str, problem: str | None = None, adapter: str | None = None) -> None:
        """It ended, in the ledger's words for it; `problem` marks the stage it was in, and the whole, as an error."""
        root = self._roots.pop(identity_id, None)
        if root is None:
            return
        from opentelemetry.trace import Status, StatusCode

        root.set_attribute("magicid.state", state)
        if adapter:
            root.set_attribute("magicid.adapter", adapter)
        if problem:
            for span in (root, *(span for _, span in [self._stages.get(identity_id, ("", root))])):
                span.set_status(Status(StatusCode.ERROR, problem))
        self._end_stage(identity_id)
        root.end()

    def _end_stage(self, identity_id: str) -> None:
        _, span = self._stages.pop(identity_id, ("", None))
        if span is not None:
            span.end()

    def close(self) -> None:
        """End what is open and send what was not sent."""
        for identity_id in list(self._roots):
            self.end(identity_id, "interrupted")
        if self._provider is not None:
            self._provider.shutdown()


def provider() -> TracerProvider | None:
    """Where spans go, by the environment; None when tracing is off.

    Raises:
        MagicIDError: it is switched on and the exporter is not installed.
    """
    if not any(os.environ.get(name) for name in _SWITCHES) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        switch = next(name for name in _SWITCHES if os.environ.get(name))
        raise MagicIDError(
            f"{switch} asks for traces, and {error.name} is not installed",
            "pip install 'magicid[tracing]', or unset the variable",
        ) from error
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "magicid"}
    made = TracerProvider(resource=Resource.create(named))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made
