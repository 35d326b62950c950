"""The first tables: jobs, shares, tenants, grants, audit, outbox."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("request_id", sa.String, nullable=False),
        sa.Column("dedupe_key", sa.String, nullable=False),
        sa.Column("target", sa.JSON, nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("identity_id", sa.String),
        sa.Column("owner", sa.String),
        sa.Column("location", sa.String),
        sa.Column("steps", sa.Integer, nullable=False),
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
    )
    op.create_index("jobs_fair_order", "jobs", ["status", "start_tag", "created_at", "id"])
    op.create_index("jobs_of_tenant", "jobs", ["tenant", "created_at", "id"])
    op.create_index("jobs_by_age", "jobs", ["created_at", "id"])
    op.create_index("jobs_open_of_tenant", "jobs", ["tenant", "status", "finish_tag"])
    op.create_index("jobs_dedupe", "jobs", ["tenant", "dedupe_key", "created_at"])
    op.create_index("jobs_of_identity", "jobs", ["identity_id", "owner"])
    op.create_index("jobs_completed_at", "jobs", ["completed_at"])
    op.create_index("jobs_expires_at", "jobs", ["expires_at"])
    op.create_table(
        "shares",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("start_tag", sa.Double, nullable=False),
        sa.Column("finish_tag", sa.Double, nullable=False),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("key_prefix", sa.String, nullable=False, index=True),
        sa.Column("key_salt", sa.LargeBinary, nullable=False),
        sa.Column("key_hash", sa.LargeBinary, nullable=False),
        sa.Column("admin", sa.Boolean, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("max_open", sa.Integer, nullable=False),
        sa.Column("requests_per_minute", sa.Integer, nullable=False),
        sa.Column("tokens", sa.Double, nullable=False),
        sa.Column("tokens_at", sa.Double, nullable=False),
        sa.CheckConstraint("weight > 0", name="weight_positive"),
    )
    op.create_table(
        "grants",
        sa.Column("tenant", sa.String, sa.ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("identity_id", sa.String, primary_key=True),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("tenant", sa.String),
        sa.Column("request_id", sa.String),
        sa.Column("subject", sa.String, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_index("audit_of_subject", "audit", ["subject", "id"])
    op.create_table(
        "outbox",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("job_id", sa.String, nullable=False, index=True),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("body", sa.String, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Double, nullable=False, index=True),
    )
    _make_audit_append_only()


def _make_audit_append_only() -> None:
    """Whoever holds the connection may add lines to the audit log, and neither change nor remove one."""
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(
                f"create trigger audit_no_{verb} before {verb} on audit"
                " begin select raise(abort, 'the audit log is append-only'); end"
            )
        return
    op.execute(
        "create function audit_is_append_only() returns trigger language plpgsql as"
        " $$ begin raise exception 'the audit log is append-only'; end $$"
    )
    op.execute(
        "create trigger audit_append_only before update or delete or truncate on audit"
        " for each statement execute function audit_is_append_only()"
    )


def downgrade() -> None:
    for table in ("outbox", "audit", "grants", "tenants", "shares", "jobs"):
        op.drop_table(table)
    if op.get_bind().dialect.name != "sqlite":
        op.execute("drop function audit_is_append_only()")
