"""Fixtures for all tests of the endpoint."""

from tests.serve.postgres import database, database_url, make_postgres, postgres_server

__all__ = ["database", "database_url", "make_postgres", "postgres_server"]
