"""The endpoint's parts, made from its settings: what the API, the dispatcher and the replicas have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable

from magicid import backbones, recipe
from serve import webhooks
from serve.api_call import Parts
from serve.audit import AuditLog
from serve.catalog import Catalog
from serve.clip_writer import open_signer
from serve.database import Database
from serve.jobs import JobStore
from serve.metrics import queue_metrics
from serve.settings import ServeSettings
from serve.tenants import TenantStore


@functools.cache
def open_database(url: str) -> Database:
    """The database of this process, brought up to date once."""
    database = Database(url)
    database.migrate()
    return database


def open_jobs(settings: ServeSettings) -> JobStore:
    """The records of videos."""
    return JobStore(
        open_database(settings.database_url),
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
        retention_s=settings.retention_s,
        max_queued=settings.max_queued,
    )


def open_tenants(settings: ServeSettings) -> TenantStore:
    """Who may do what."""
    return TenantStore(open_database(settings.database_url))


def open_audit(settings: ServeSettings) -> AuditLog:
    """Who did what."""
    return AuditLog(open_database(settings.database_url))


def open_catalog(settings: ServeSettings) -> Catalog:
    """The models by name."""
    loaded = recipe.load(settings.recipe)
    return Catalog(settings.adapters, settings.base or loaded.name, backbones.base_sha256(loaded))


def open_outbox(settings: ServeSettings) -> Callable[[], object]:
    """What sends the webhooks that are due; nothing without a secret to sign them."""
    if not settings.webhook_secret:
        return lambda: 0
    return webhooks.WebhookSender(open_database(settings.database_url), settings.webhook_secret).deliver


def open_parts(settings: ServeSettings) -> Parts:
    """What the API stands on."""
    jobs = open_jobs(settings)
    return Parts(
        jobs=jobs,
        tenants=open_tenants(settings),
        audit=open_audit(settings),
        catalog=open_catalog(settings),
        recipe=recipe.load(settings.recipe),
        check_webhook=webhooks.check_url,
        metrics=lambda: queue_metrics(jobs),
        signer=open_signer(settings),
    )
