"""Databases as hosts offer them: they wake up slowly, reject options, and allow few connections."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support.databases import as_url
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.load import at_once
from tests.support.postgres import Postgres
from tests.support.processes import wait_until
from tests.support.relay import SlowRelay, StrictRelay, sockets_to
from tests.support.service import workers

FLASK = [sys.executable, "-m", "flask", "--app", "wsgi"]
SLEEPY = 3.0  # seconds that each connection takes


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    running = Postgres(tmp_path_factory.mktemp("hosted") / "server")
    yield running
    running.stop()


@pytest.fixture
def sleepy(postgres: Postgres) -> Iterator[SlowRelay]:
    """Run a relay that passes each connection on after three seconds."""
    relay = SlowRelay(postgres.conninfo, SLEEPY)
    yield relay
    relay.close()


def flask(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a command of flask and wait for its end."""
    return subprocess.run(
        [*FLASK, *arguments],
        cwd=ROOT,
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_database_that_wakes_up_slowly_is_reached_without_any_setting(sleepy: SlowRelay, start: Start) -> None:
    service = start(DATABASE_URL=as_url(sleepy.conninfo))
    service.wait()
    sleepy.delay = 0
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
    assert service.stop() == 0


def test_migrate_waits_as_long_as_the_url_says(sleepy: SlowRelay) -> None:
    done = flask("migrate", DATABASE_URL=as_url(make_conninfo(sleepy.conninfo, connect_timeout=60)))
    assert (done.returncode, done.stdout) == (0, "The database is up to date.\n"), done.stderr
    assert "does not respond yet" not in done.stderr


def test_migrate_wakes_a_database_without_any_setting(sleepy: SlowRelay) -> None:
    done = flask("migrate", DATABASE_URL=as_url(sleepy.conninfo))
    assert (done.returncode, done.stdout) == (0, "The database is up to date.\n"), done.stderr
    assert done.stderr.count("the database does not respond yet: connection timeout expired") == 1


@pytest.mark.long
def test_migrate_does_not_wait_forever_for_a_database_that_never_wakes(sleepy: SlowRelay) -> None:
    sleepy.delay = 600
    began = time.monotonic()
    done = flask("migrate", DATABASE_URL=as_url(sleepy.conninfo))
    assert (done.returncode, done.stdout) == (3, "")
    assert 20 < time.monotonic() - began < 60
    assert done.stderr.splitlines()[-1].startswith("todo_api: connection timeout expired")


def test_sockets_of_failed_attempts_are_closed(sleepy: SlowRelay, start: Start) -> None:
    sleepy.delay = 600
    service = start(DATABASE_URL=as_url(make_conninfo(sleepy.conninfo, connect_timeout=2)))
    wait_until(lambda: service.answers("/healthz"))
    [worker] = workers(service)
    seen = []
    end = time.monotonic() + 12
    while time.monotonic() < end:
        service.answers()
        seen.append(sockets_to(worker.pid, sleepy.port))
        time.sleep(0.1)
    # At most one attempt for each connection of the pool is in progress. Failed ones would add up.
    assert max(seen) <= 4
    assert max(seen[len(seen) // 2 :]) >= 1
    assert service.stop() == 0


def test_settings_of_the_url_the_environment_and_a_service_file_take_precedence(
    postgres: Postgres, start: Start, tmp_path: Path
) -> None:
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        for schema in ("from_url", "from_environment", "from_service"):
            db.execute(f"CREATE SCHEMA {schema}".encode())
    services = tmp_path / "services"
    host, port = postgres.conninfo.split()[:2]
    lines = ["[todo]", host, port, "user=postgres", "dbname=postgres", "options=-c search_path=from_service"]
    services.write_text("\n".join(lines), encoding="utf-8")
    cases: dict[str, dict[str, Any]] = {
        "from_url": {"DATABASE_URL": as_url(make_conninfo(postgres.conninfo, options="-c search_path=from_url"))},
        "from_environment": {
            "DATABASE_URL": as_url(postgres.conninfo),
            "PGOPTIONS": "-c search_path=from_environment -c statement_timeout=7s",
        },
        "from_service": {"DATABASE_URL": "postgresql://?service=todo", "PGSERVICEFILE": services},
    }
    for schema, settings in cases.items():
        service = start(**settings).wait()
        assert service.client.post("/api/tasks", json={"title": schema}).status_code == httpx.codes.CREATED
        with psycopg.connect(postgres.conninfo) as db:
            db.execute(f"SET search_path = {schema}".encode())
            assert db.execute("SELECT title FROM tasks").fetchall() == [(schema,)]
        assert service.stop() == 0


def test_the_error_for_a_proxy_that_rejects_options_names_database_pooler(postgres: Postgres, start: Start) -> None:
    relay = StrictRelay(postgres.conninfo)
    rejected = start(DATABASE_URL=as_url(relay.conninfo), DATABASE_POOLER=False)
    assert rejected.process.wait(timeout=120) == 3
    assert re.fullmatch("todo_api: .*DATABASE_POOLER=true.*\n", rejected.log())
    service = start(DATABASE_URL=as_url(relay.conninfo), DATABASE_POOLER=True).wait()
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
    assert service.stop() == 0
    relay.close()


def test_a_server_out_of_connections_is_not_taken_for_a_pooler(postgres: Postgres, start: Start) -> None:
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute("CREATE ROLE single LOGIN CREATEROLE CONNECTION LIMIT 1")
        db.execute("CREATE DATABASE single OWNER single")
    single = make_conninfo(postgres.conninfo, user="single", dbname="single")
    with psycopg.connect(single):
        service = start(DATABASE_URL=as_url(single), DATABASE_POOLER=False, DATABASE_ROLE="of_single")
        wait_until(lambda: service.answers("/healthz"))
        assert "too many connections" in service.log()
    service.wait()
    assert service.stop() == 0


@pytest.mark.parametrize("options", [[], ["--preload"]], ids=str)
def test_two_workers_share_the_few_connections_that_the_server_allows(
    options: list[str], postgres: Postgres, start: Start
) -> None:
    name = f"four{len(options)}"
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute(f"CREATE ROLE {name} LOGIN CREATEROLE CONNECTION LIMIT 4".encode())
        db.execute(f"CREATE DATABASE {name} OWNER {name}".encode())
    url = as_url(make_conninfo(postgres.conninfo, user=name, dbname=name))
    settings = {"DATABASE_POOLER": False, "DATABASE_ROLE": f"of_{name}", "WEB_CONCURRENCY": 2}
    service = start(command=[sys.executable, "wsgi.py", *options], DATABASE_URL=url, **settings).wait()
    wait_until(lambda: len(workers(service)) == 2)
    at_once(service, 16, lambda client, _: client.get("/api/tasks"))
    responses = [httpx.post(f"{service.url}/api/tasks", json={"title": "Buy milk"}) for _ in range(60)]
    assert {response.status_code for response in responses} == {httpx.codes.CREATED}
    assert service.stop() == 0


def test_a_start_logs_how_many_connections_it_needs_if_the_server_allows_fewer(
    postgres: Postgres, start: Start
) -> None:
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute("CREATE ROLE five LOGIN CREATEROLE CONNECTION LIMIT 5")
        db.execute("CREATE DATABASE five OWNER five CONNECTION LIMIT 9")
    five = make_conninfo(postgres.conninfo, user="five", dbname="five")
    settings = {"DATABASE_URL": as_url(five), "DATABASE_POOLER": False, "DATABASE_ROLE": "of_five"}
    fitting = start(**settings).wait()
    assert "connections, but the server allows" not in fitting.log()
    assert fitting.stop() == 0
    command = [sys.executable, "wsgi.py", "--threads", "3"]
    service = start(**settings, WEB_CONCURRENCY=2, command=command).wait()
    warning = "2 workers with 3 threads each need 6 database connections, but the server allows 5: "
    assert service.log().count(warning) == 1
    assert service.stop() == 0
