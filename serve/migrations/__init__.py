"""Alembic migrations of the endpoint's records; run by `Database.migrate`."""
