"""Figures for Prometheus: the engine's through Ray's own exporter, the queue's from the records at /metrics.

No prompt, key or name of a person is a label. /metrics is for anybody who reaches the endpoint, so tenants are named in
Ray's export only.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from ray.serve import metrics as serve_metrics

from serve.adapter_cache import AdapterCache
from serve.jobs import JobStore, TenantQueue

_SECONDS: list[float] = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
MAX_TENANTS, OTHER = 50, "other"
_COUNTS: list[float] = [1, 2, 3, 4, 6, 8, 12, 16, 32]


class EngineMetrics:
    """What `serve.worker.Worker` reports, as Ray metrics of this replica."""

    def __init__(self) -> None:
        self.step_s = serve_metrics.Histogram(
            "magicid_step_seconds", description="One denoising step of the batch.", boundaries=_SECONDS
        )
        self.rows = serve_metrics.Histogram(
            "magicid_batch_rows", description="Videos in one denoising step.", boundaries=_COUNTS
        )
        self.identities = serve_metrics.Histogram(
            "magicid_batch_identities", description="Identities in one denoising step.", boundaries=_COUNTS
        )
        self.swaps = serve_metrics.Counter("magicid_swaps", description="Rows of the batch that got another adapter.")
        self.outcomes = serve_metrics.Counter(
            "magicid_videos", description="Videos that left a replica.", tag_keys=("outcome",)
        )
        self.wait_s = serve_metrics.Histogram(
            "magicid_wait_seconds", description="From the request to the first step.", boundaries=_SECONDS
        )
        self.run_s = serve_metrics.Histogram(
            "magicid_run_seconds", description="From the claim to the end.", boundaries=_SECONDS
        )
        self.cache_bytes = serve_metrics.Gauge("magicid_cache_bytes", description="Adapters in memory.")
        self.cache_events = {
            name: serve_metrics.Gauge(f"magicid_cache_{name}", description=f"{name} of the adapter cache so far.")
            for name in ("hits", "misses", "evictions")
        }

    def step(self, seconds: float, rows: int, identities: int, swaps: int) -> None:
        """One denoising step of the batch, before which `swaps` rows got another adapter."""
        self.step_s.observe(seconds)
        self.rows.observe(rows)
        self.identities.observe(identities)
        if swaps:
            self.swaps.inc(swaps)

    def ended(self, outcome: str, wait_s: float, run_s: float) -> None:
        """One job left."""
        self.outcomes.inc(tags={"outcome": outcome})
        self.wait_s.observe(wait_s)
        self.run_s.observe(run_s)

    def cache(self, cache: AdapterCache) -> None:
        """The adapter cache after a change."""
        stats = cache.stats
        self.cache_bytes.set(stats.bytes)
        for name, gauge in self.cache_events.items():
            gauge.set(getattr(stats, name))


class TenantMetrics:
    """The queues of single tenants, as Ray metrics of the dispatcher. Those beyond the first 50 count as one, `other`.

    A label once given stays given until the process ends; so their number is bounded, however tenants come and go.
    """

    def __init__(self) -> None:
        self.waiting = serve_metrics.Gauge(
            "magicid_tenant_waiting_jobs", description="Videos of a tenant that wait.", tag_keys=("tenant",)
        )
        self.oldest_s = serve_metrics.Gauge(
            "magicid_tenant_oldest_seconds",
            description="Age of a tenant's longest-waiting video.",
            tag_keys=("tenant",),
        )
        self.named: set[str] = set()

    def queues(self, found: Sequence[TenantQueue]) -> None:
        """What waits now; a tenant that is not among them has nothing waiting."""
        values = dict.fromkeys([*self.named, OTHER], (0, 0.0))
        for queue in found:
            if len(self.named) < MAX_TENANTS:
                self.named.add(queue.tenant)
            label = queue.tenant if queue.tenant in self.named else OTHER
            waiting, oldest_s = values.get(label, (0, 0.0))
            values[label] = (waiting + queue.waiting, max(oldest_s, queue.oldest_s))
        for label, (waiting, oldest_s) in values.items():
            self.waiting.set(waiting, tags={"tenant": label})
            self.oldest_s.set(oldest_s, tags={"tenant": label})


def queue_metrics(jobs: JobStore) -> bytes:
    """The queue as the records know it, in Prometheus' text format: the same from every replica of the API."""
    registry = CollectorRegistry()
    work = jobs.open_work()
    for name, value, meaning in (
        ("magicid_queue_jobs", work.queued, "Videos that wait."),
        ("magicid_running_jobs", work.in_progress, "Videos in progress."),
        ("magicid_queue_steps", work.queued_steps, "Denoising steps that wait."),
        ("magicid_queue_oldest_seconds", work.oldest_s, "Age of the longest-waiting video."),
    ):
        Gauge(name, meaning, registry=registry).set(value)
    return generate_latest(registry)
