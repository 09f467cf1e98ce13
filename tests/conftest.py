"""What the tests share: a real service on a real PostgreSQL, and ways to look at both.

The database is an embedded one in a temporary folder, or a new one beside the one that TEST_DATABASE_URL names. Where
TEST_POOLER is set, services reach it, and each other server that has a URL, through a PgBouncer in transaction mode.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import psutil
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from todo_api import cluster, config, embedded

from . import pgbouncer

config.drop_libpq_variables()  # the tests' connection strings say everything

ROOT = Path(__file__).resolve().parent.parent
PSQLS = sorted({str(cluster.BIN / "psql"), *filter(None, [shutil.which("psql")])})
POOLER = {"DATABASE_POOLER": "true"} if os.environ.get("TEST_POOLER") else {}
START_TIMEOUT = 60  # seconds; far more than a start takes, so that a busy machine fails no test


def environment(**settings: object) -> dict[str, str]:
    """Give the environment for a command: this one without the service's settings and libpq's, then ``settings``."""
    ours = tuple(field.name.upper() for field in fields(config.Settings))
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PG")}
    return kept | POOLER | {name: str(value) for name, value in settings.items()}


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def wait_until(what: Callable[[], bool], *, timeout: float = START_TIMEOUT) -> None:
    """Wait until something holds, and fail if it never does."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


class Service:
    """A running ``python wsgi.py``, or another command that serves the application on PORT."""

    def __init__(self, log: Path, command: list[str] | None = None, **options: Any) -> None:
        """Start it; ``options`` are settings, and ``cwd`` and ``prefix`` for the process."""
        self.log_file = log
        cwd = options.pop("cwd", ROOT)
        prefix = options.pop("prefix", [])
        self.port = options.setdefault("PORT", free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, *(command or [sys.executable, "wsgi.py"])],
                cwd=cwd,
                env=environment(**options),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.client = httpx.Client(base_url=self.url, timeout=30, verify=False)

    def log(self) -> str:
        """Read what it has logged so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def answers(self, path: str = "/readyz") -> bool:
        """Say whether it answers a GET with 200."""
        try:
            return self.client.get(path).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def wait(self) -> "Service":
        """Wait until it can reach its database."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers():
            assert self.process.poll() is None, f"the service ended:\n{self.log()}"
            assert time.monotonic() < deadline, f"the service did not get ready:\n{self.log()}"
            time.sleep(0.02)
        return self

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send the master a signal, wait for its end and give its exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        """SIGKILL the whole process group: the master and its workers."""
        self.client.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


def servers_in(folder: Path) -> list[psutil.Process]:
    """Find the PostgreSQL processes that run on a cluster in a folder."""
    return [
        process
        for process in psutil.process_iter(["name", "cwd", "ppid"])
        if process.info["name"] == "postgres" and Path(process.info["cwd"] or "/").is_relative_to(folder.resolve())
    ]


def postmaster_in(folder: Path) -> psutil.Process:
    """Find the PostgreSQL process that is the parent of the others."""
    servers = servers_in(folder)
    # What was seen, since some may be gone by now: a server ends processes of its own.
    [first] = [server for server in servers if server.info["ppid"] not in {other.pid for other in servers}]
    return first


Figure = Callable[[str, object], None]


@pytest.fixture
def figure(record_property: Figure) -> Figure:
    """Give a function that has a figure printed at the end of the run, by its name; the README quotes these."""
    return record_property


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests saw."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    figures = {figure for report in reports for figure in getattr(report, "user_properties", [])}
    for name, value in sorted(figures):
        terminalreporter.write_line(f"{name}: {value}")


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Give a function that starts a service; whatever the test leaves running in its folder is ended after it."""
    started: list[Service] = []

    def start(**options: Any) -> Service:
        started.append(Service(tmp_path / f"log{len(started)}", **{"WEB_CONCURRENCY": 1, **options}))
        return started[-1]

    yield start
    for service in started:
        if service.process.poll() is None:
            service.kill()
    for process in servers_in(tmp_path):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def pytest_sessionfinish() -> None:
    """Stop the poolers that as_url started."""
    pgbouncer.stop_shared()


def as_url(conninfo: str) -> str:
    """Write a connection string as a URL, the form that DATABASE_URL takes; where TEST_POOLER is set, by way of one."""
    if POOLER:
        conninfo = pgbouncer.shared(make_conninfo(conninfo, dbname=None)).in_front_of(conninfo)
    return f"postgresql://?{urlencode(conninfo_to_dict(conninfo))}"


@contextmanager
def new_database(conninfo: str) -> Iterator[str]:
    """Make an empty database beside the tests' one, owned by the same role, and drop it in the end."""
    name = f"todo_test_{uuid.uuid4().hex}"
    role = conninfo_to_dict(conninfo)["user"]
    # The embedded server's role may not create databases; the role of TEST_DATABASE_URL must.
    admin = conninfo if os.environ.get("TEST_DATABASE_URL") else make_conninfo(conninfo, user="postgres")
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(str(role)))
        )
        yield make_conninfo(conninfo, dbname=name)
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def conninfo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the connection string of a database of this test process's own; two processes share the tests."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        with new_database(given) as database:
            yield database
    else:
        yield embedded.start(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def database_url(conninfo: str) -> str:
    """Give the tests' database as a URL, the form that DATABASE_URL takes."""
    return as_url(conninfo)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[Service]:
    """Run the service for the whole session."""
    running = Service(tmp_path_factory.mktemp("service") / "log", DATABASE_URL=database_url).wait()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def client(service: Service) -> httpx.Client:
    """Give an HTTP client of the service."""
    return service.client


@pytest.fixture
def db(service: Service, conninfo: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Give a connection to the service's database, which holds no tasks and no keys."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("DELETE FROM tasks")
        connection.execute("DELETE FROM idempotency_keys")
        yield connection


Create = Callable[..., dict[str, Any]]


@pytest.fixture
def create(client: httpx.Client) -> Create:
    """Give a function that creates a task and returns it."""

    def create(title: str = "Buy milk", **members: Any) -> dict[str, Any]:
        response = client.post("/api/tasks", json={"title": title, **members})
        assert response.status_code == httpx.codes.CREATED, response.text
        task: dict[str, Any] = response.json()
        return task

    return create


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Check that an answer is the problem that SPEC describes, and give its members."""
    assert (response.status_code, response.headers["Content-Type"]) == (status, "application/problem+json")
    problem: dict[str, Any] = response.json()
    assert problem["type"] == kind
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert set(problem) - {"errors"} == {"type", "title", "status", "detail", "instance"}
    return problem


def run_psql(
    conninfo: str, file: str, variables: Mapping[str, object], *, psql: str = PSQLS[0], arguments: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a .sql file as the README says."""
    assigned = [f"--set={name}={value}" for name, value in variables.items()]
    return subprocess.run(
        [psql, "-X", "-v", "ON_ERROR_STOP=1", *assigned, *arguments, "-f", file, conninfo],
        cwd=ROOT,
        env=environment(PGTZ="UTC"),
        capture_output=True,
        text=True,
        check=False,
    )
