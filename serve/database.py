"""The endpoint's records: tables, transactions and migrations, on SQLite for one node and PostgreSQL for several.

Nothing that must outlive a process is kept elsewhere: a replica, the API or the dispatcher may die at any time.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from magicid.errors import StorageError

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_S = 30  # a writer of SQLite waits this long for another; transactions take milliseconds
_alembic_lock = threading.Lock()  # alembic keeps its context in module globals

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("request_id", sa.String, nullable=False),
    sa.Column("dedupe_key", sa.String, nullable=False),
    sa.Column("target", sa.JSON, nullable=False),
    sa.Column("request", sa.JSON, nullable=False),
    # Copies out of target and request, to search and sort by.
    sa.Column("identity_id", sa.String),
    sa.Column("owner", sa.String),
    sa.Column("location", sa.String),
    sa.Column("steps", sa.Integer, nullable=False),
    # Where the job stands in the fair order: claimed steps / weight before it, and with it.
    sa.Column("start_tag", sa.Double, nullable=False),
    sa.Column("finish_tag", sa.Double, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("progress", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("expires_at", sa.Double),
    sa.Column("worker", sa.String),
    sa.Column("lease_until", sa.Double),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("error_code", sa.String),
    sa.Column("error_message", sa.String),
    sa.Column("video_uri", sa.String),
    sa.Column("video_sha256", sa.String),
    sa.Column("webhook_url", sa.String),
    sa.CheckConstraint("status in ('queued', 'in_progress', 'completed', 'failed')", name="status_known"),
    sa.CheckConstraint("progress between 0 and 100", name="progress_in_per_cent"),
    sa.Index("jobs_fair_order", "status", "start_tag", "created_at", "id"),
    sa.Index("jobs_of_tenant", "tenant", "created_at", "id"),
    sa.Index("jobs_by_age", "created_at", "id"),
    sa.Index("jobs_open_of_tenant", "tenant", "status", "finish_tag"),
    sa.Index("jobs_dedupe", "tenant", "dedupe_key", "created_at"),
    sa.Index("jobs_of_identity", "identity_id", "owner"),
    sa.Index("jobs_completed_at", "completed_at"),
    sa.Index("jobs_expires_at", "expires_at"),
)

# What each tenant has been given: tags of the furthest job that was claimed.
shares = sa.Table(
    "shares",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("start_tag", sa.Double, nullable=False),
    sa.Column("finish_tag", sa.Double, nullable=False),
)

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("key_prefix", sa.String, nullable=False, index=True),
    sa.Column("key_salt", sa.LargeBinary, nullable=False),
    sa.Column("key_hash", sa.LargeBinary, nullable=False),
    sa.Column("admin", sa.Boolean, nullable=False),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("max_open", sa.Integer, nullable=False),
    sa.Column("requests_per_minute", sa.Integer, nullable=False),
    # The token bucket: how many requests it held, and when.
    sa.Column("tokens", sa.Double, nullable=False),
    sa.Column("tokens_at", sa.Double, nullable=False),
    sa.CheckConstraint("weight > 0", name="weight_positive"),
)

grants = sa.Table(
    "grants",
    metadata,
    sa.Column("tenant", sa.String, sa.ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("identity_id", sa.String, primary_key=True),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("tenant", sa.String),
    sa.Column("request_id", sa.String),
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Index("audit_of_subject", "subject", "id"),
)

# Webhooks still to be delivered; written in the transaction that ends the job.
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("job_id", sa.String, nullable=False, index=True),
    sa.Column("url", sa.String, nullable=False),
    sa.Column("body", sa.String, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due_at", sa.Double, nullable=False, index=True),
)


class Database:
    """One database, by its SQLAlchemy URL (`sqlite:///path` or `postgresql+psycopg://...`); for threads to share.

    A process makes its own: connections do not travel.
    """

    def __init__(self, url: str) -> None:
        """Raises StorageError: not such a URL."""
        try:
            parsed = sa.make_url(url)
            self.is_sqlite = parsed.get_backend_name() == "sqlite"
            options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_S}} if self.is_sqlite else {}
            # Without hide_parameters an error's text would quote prompts.
            self.engine = sa.create_engine(parsed, hide_parameters=True, pool_pre_ping=not self.is_sqlite, **options)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError) as error:
            raise StorageError(
                "the database's URL is not one that SQLAlchemy can open",  # the URL itself may hold a password
                "use sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/NAME",
            ) from error
        self._name = parsed.render_as_string(hide_password=True).split("?")[0]
        if self.is_sqlite:
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            sa.event.listen(self.engine, "connect", _set_up_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def session(self) -> Iterator[sa.Connection]:
        """A connection inside a transaction that may write: committed at the end, rolled back on an exception."""
        with self._connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """The same for statements that only read: waits for no writer."""
        with self._connect() as connection:
            connection = connection.execution_options(read_only=True)
            with connection.begin():
                yield connection

    def exclusively(self, connection: sa.Connection, purpose: str) -> None:
        """Let one transaction at a time go on for this purpose, until its end."""
        if not self.is_sqlite:  # there, a writer is alone already
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"magicid {purpose}"))))

    def migrate(self) -> None:
        """Make or upgrade the tables; safe when several processes do so at once. Raises StorageError."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        try:
            with _alembic_lock, self.session() as connection:
                self.exclusively(connection, "migrate")
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except sa.exc.SQLAlchemyError as error:
            raise StorageError(
                f"the tables of {self._name} cannot be made: {type(error).__name__}",
                "check that its user may create tables, and that no newer version of magicid has used it",
            ) from error

    def close(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()

    def _connect(self) -> sa.Connection:
        try:
            return self.engine.connect()
        except sa.exc.OperationalError as error:
            raise StorageError(
                f"no connection to the database {self._name}", "check that it runs and that its folder is writable"
            ) from error


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say, not at the first write
    with suppress(sqlite3.OperationalError):  # locked: another process is switching this very file
        connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")  # a record that was answered for survives a power cut
    connection.execute("pragma foreign_keys = on")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer that began as a reader could fail half-way ("database is locked") instead of waiting its turn.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("begin" if read_only else "begin immediate")
