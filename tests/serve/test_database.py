"""The records' tables: made once whoever starts first, equal to what the code says, and kept from half-way writes."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from magicid.errors import StorageError
from serve.audit import AuditLog
from serve.database import Database, metadata, shares


def _migrate(url: str, start: multiprocessing.synchronize.Barrier) -> None:
    opened = Database(url)
    start.wait(60)
    opened.migrate()


def test_several_processes_migrate_at_once(database_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    processes = [context.Process(target=_migrate, args=(database_url, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    opened = Database(database_url)
    with opened.reading() as connection:
        tables = set(sa.inspect(connection).get_table_names())
        assert tables == {*metadata.tables, "alembic_version"}
        if opened.is_sqlite:
            assert connection.exec_driver_sql("pragma journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("pragma synchronous").scalar() == 2
    opened.close()


def test_migrations_make_the_tables_that_the_code_uses(database: Database) -> None:
    database.migrate()  # a second time changes nothing
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_an_exception_rolls_back(database: Database) -> None:
    row = {"tenant": "ada", "start_tag": 0.0, "finish_tag": 1.0}

    def write_twice() -> None:
        with database.session() as connection:
            connection.execute(sa.insert(shares).values(row))
            connection.execute(sa.insert(shares).values(row))

    with pytest.raises(sa.exc.IntegrityError):
        write_twice()
    with database.session() as connection:
        assert connection.execute(sa.select(shares)).all() == []
        connection.execute(sa.insert(shares).values(row))
    with database.reading() as connection:
        assert [tuple(found) for found in connection.execute(sa.select(shares))] == [("ada", 0.0, 1.0)]


def test_read_and_write_in_one_transaction_loses_no_update(database: Database) -> None:
    """Eight threads count to 5 each: what one of them read, no other has changed before it writes."""
    with database.session() as connection:
        connection.execute(sa.insert(shares).values(tenant="n", start_tag=0, finish_tag=0))

    def count() -> None:
        for _ in range(5):
            with database.session() as connection:
                read = connection.execute(sa.select(shares.c.finish_tag).with_for_update()).scalar_one()
                connection.execute(sa.update(shares).values(finish_tag=read + 1))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as connection:
        assert connection.execute(sa.select(shares.c.finish_tag)).scalar_one() == 40


def test_errors_name_the_database_and_no_secret(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="URL") as caught:
        Database("mysterydb://ada:hunter2@host/x")
    assert "hunter2" not in str(caught.value)
    unreachable = Database("postgresql+psycopg://ada:hunter2@127.0.0.1:1/records")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1/records") as caught:
        unreachable.migrate()
    assert "hunter2" not in str(caught.value)
    taken = tmp_path / "other.sqlite"
    taken.write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match=r"other\.sqlite"):
        Database(f"sqlite:///{taken}").migrate()


def test_a_failed_statement_does_not_quote_its_values(database: Database) -> None:
    row = {"tenant": "a secret prompt", "start_tag": 0.0, "finish_tag": 1.0}
    with pytest.raises(sa.exc.IntegrityError) as caught, database.session() as connection:
        connection.execute(sa.insert(shares), [row, row])
    if database.is_sqlite:  # PostgreSQL's own message names the key of a conflict; prompts are in no key
        assert "secret prompt" not in str(caught.value)
    assert "[SQL parameters hidden" in str(caught.value)


def test_the_audit_log_is_read_in_order_and_cannot_be_changed(database: Database) -> None:
    now = [100.0]
    log = AuditLog(database, clock=lambda: now[0])
    log.write("video.create", tenant="ada", request_id="r1", subject="video_1", detail={"model": "m", "n": 2})
    now[0] = 101.5
    log.write("video.delete", tenant="bob", request_id=None, subject="video_1", detail={})
    log.write("identity.delete", tenant=None, request_id="r3", subject="carla", detail={"versions": ["v1"]})

    entries = log.read()
    assert [entry.action for entry in entries] == ["video.create", "video.delete", "identity.delete"]
    assert (entries[0].at, entries[0].detail, entries[0].request_id) == (100.0, {"model": "m", "n": 2}, "r1")
    assert [entry.at for entry in log.read(subject="video_1")] == [100.0, 101.5]
    assert [entry.tenant for entry in log.read(tenant="bob")] == ["bob"]
    assert [entry.subject for entry in log.read(after=entries[1].id)] == ["carla"]
    assert log.read(limit=1) == entries[:1]

    for statement in ("update audit set tenant = 'eve'", "delete from audit"):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), database.session() as connection:
            connection.exec_driver_sql(statement)
    assert log.read() == entries
