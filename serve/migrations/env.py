"""How alembic runs here: on the connection, and inside the transaction, that `Database.migrate` hands over."""

from __future__ import annotations

from alembic import context

from serve.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
