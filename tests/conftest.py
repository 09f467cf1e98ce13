"""The fixtures that the tests share: a real service on a real PostgreSQL.

The database belongs to an embedded PostgreSQL in a temporary folder, or to the server that TEST_DATABASE_URL names. If
TEST_POOLER is set, services connect to every server through a PgBouncer in transaction mode. If TEST_PARTITIONED is
set, the tables are shared out by user over partitions.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support import pgbouncer
from tests.support.capabilities import root_lacks
from tests.support.databases import as_url, migrate, new_database
from tests.support.fixtures import Create, Figure, Start
from tests.support.postgres import admit_all_roles
from tests.support.processes import postmaster_in, send, servers_in
from tests.support.service import Service
from todo_api import embedded


def pytest_configure() -> None:
    """Let the processes of tests receive SIGINT. A shell that starts pytest in the background ignores it for them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def figure(record_property: Figure) -> Figure:
    """Return a function that takes the name and the value of a figure, which pytest prints at the end of the run."""
    return record_property


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that the tests measured."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    figures = {figure for report in reports for figure in getattr(report, "user_properties", [])}
    for name, value in sorted(figures):
        terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def tmp_path_factory(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch_session: pytest.MonkeyPatch
) -> pytest.TempPathFactory:
    """Let the user that PostgreSQL runs as enter the folders of tests, which pytest closes to other users.

    Root in a container lacks the capability that lets PostgreSQL enter closed folders.
    """
    if not root_lacks("dac_read_search"):
        return tmp_path_factory

    def opened(folder: Path) -> Path:
        folder.chmod(0o711)
        return folder

    base = tmp_path_factory.getbasetemp()
    for folder in (base, *(parent for parent in base.parents if parent.name.startswith("pytest-"))):
        opened(folder)
    make = tmp_path_factory.mktemp
    monkeypatch_session.setattr(
        tmp_path_factory, "mktemp", lambda basename, numbered=True: opened(make(basename, numbered))
    )
    return tmp_path_factory


@pytest.fixture(scope="session")
def monkeypatch_session() -> Iterator[pytest.MonkeyPatch]:
    """Return a MonkeyPatch whose changes last for the whole session."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a service. After the test, kill the services and servers that it left."""
    started: list[Service] = []

    def start(**options: Any) -> Service:
        started.append(Service(tmp_path / f"log{len(started)}", **{"WEB_CONCURRENCY": 1, **options}))
        return started[-1]

    yield start
    for service in started:
        if service.process.poll() is None:
            service.kill()
    send(signal.SIGKILL, *servers_in(tmp_path))


def pytest_sessionfinish() -> None:
    """Stop the poolers that as_url started."""
    pgbouncer.stop_shared()


@pytest.fixture(scope="session")
def conninfo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the connection string of a database for this test process only; pytest runs two processes."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        with new_database(given) as database:
            migrate(database)
            yield database
    else:
        data_dir = tmp_path_factory.mktemp("data").resolve()
        database = embedded.start(data_dir)
        superuser = admit_all_roles(data_dir / "postgres", postmaster_in(data_dir))
        with psycopg.connect(superuser, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # see tests/support/postgres.py
            connection.execute("SELECT pg_reload_conf()")
        migrate(database)
        yield database


@pytest.fixture(scope="session")
def database_url(conninfo: str) -> str:
    """Return the URL of the tests' database, as DATABASE_URL takes it."""
    return as_url(conninfo)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[Service]:
    """Run the service for the whole session."""
    running = Service(tmp_path_factory.mktemp("service") / "log", DATABASE_URL=database_url).wait()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def client(service: Service) -> httpx.Client:
    """Return an HTTP client of the service."""
    return service.client


@pytest.fixture
def db(service: Service, conninfo: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return a connection to the service's database, without any tasks and idempotency keys."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("DELETE FROM tasks")
        connection.execute("DELETE FROM idempotency_keys")
        yield connection


@pytest.fixture
def create(client: httpx.Client) -> Create:
    """Return a function that creates a task and returns it."""

    def create(title: str = "Buy milk", **members: Any) -> dict[str, Any]:
        response = client.post("/api/tasks", json={"title": title, **members})
        assert response.status_code == httpx.codes.CREATED, response.text
        task: dict[str, Any] = response.json()
        return task

    return create
