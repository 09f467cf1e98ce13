"""The service behind PgBouncer in transaction mode, with DATABASE_POOLER=true: all calls work, 503s are quick."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support import pgbouncer
from tests.support.databases import as_url
from tests.support.fixtures import Figure, Start
from tests.support.load import Load, assert_acknowledged_once, at_once
from tests.support.optional_tools import program
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import Postgres
from tests.support.problems import assert_problem, assert_quick
from tests.support.processes import wait_until
from tests.support.service import Service

# The settings that PgBouncer sets on a server's connection, to the values of the current client.
PGBOUNCERS_OWN = {"application_name", "client_encoding", "DateStyle", "standard_conforming_strings", "TimeZone"}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    assert pgbouncer.PROGRAM or program("pgbouncer")
    running = Postgres(tmp_path_factory.mktemp("poolers") / "server")
    yield running
    running.stop()


@pytest.fixture
def bouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    """Run a PgBouncer in front of it, with two connections to it for eight clients."""
    with pgbouncer.running(postgres.conninfo, default_pool_size=2) as running:
        yield running


@pytest.fixture
def service(postgres: Postgres, bouncer: PgBouncer, start: Start) -> Service:
    """Run a service of two workers behind the PgBouncer, on a database without tasks."""
    running = start(DATABASE_URL=url(bouncer, postgres), DATABASE_POOLER=True, WEB_CONCURRENCY=2).wait()
    query(postgres, "DELETE FROM tasks")
    return running


def url(bouncer: PgBouncer, postgres: Postgres) -> str:
    """Return the URL that reaches a PostgreSQL through a PgBouncer."""
    return as_url(bouncer.in_front_of(postgres.conninfo))


def query(postgres: Postgres, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
    """Run a statement on PostgreSQL, not through the pooler, and return its rows."""
    with psycopg.connect(postgres.conninfo, dbname=database, autocommit=True) as db:
        cursor = db.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def use_every_call(client: httpx.Client, number: int) -> httpx.Response:
    """Create a task, make every other call with it, and return the last response."""
    created = client.post("/api/tasks", json={"title": f"number {number}."})
    assert created.status_code == httpx.codes.CREATED
    path = f"/api/tasks/{created.json()['id']}"
    responses = [
        client.get(path),
        client.get("/api/tasks", params={"q": f"number {number}."}),
        client.patch(path, json={"description": "changed"}),
        client.post(f"{path}/toggle"),
        client.delete(path),
    ]
    assert {response.status_code for response in responses} == {200}
    assert responses[1].json() == [created.json()]
    assert {"completed": True, "version": 3, "description": "changed"}.items() <= responses[-1].json().items()
    return responses[-1]


def test_every_call_works_while_eight_clients_share_two_connections(
    service: Service, bouncer: PgBouncer, postgres: Postgres
) -> None:
    assert len(at_once(service, 60, use_every_call)) == 60
    assert len(bouncer.console("SHOW SERVERS")) == 2
    wait_until(lambda: len([client for client in bouncer.console("SHOW CLIENTS") if "postgres" in client]) >= 8)
    assert service.client.get("/api/tasks").json() == []


def test_no_session_state_is_left_for_other_clients(postgres: Postgres, start: Start) -> None:
    with pgbouncer.running(postgres.conninfo, default_pool_size=1) as bouncer:
        service = start(DATABASE_URL=url(bouncer, postgres), DATABASE_POOLER=True).wait()
        at_once(service, 10, use_every_call)
        pid = query(postgres, "SELECT pid FROM pg_stat_activity WHERE application_name = 'todo_api'")
        with psycopg.connect(bouncer.in_front_of(postgres.conninfo), autocommit=True, prepare_threshold=None) as other:
            assert [other.execute("SELECT pg_backend_pid()").fetchone()] == pid  # the connection that the service used
            assert other.execute("SELECT name, statement FROM pg_prepared_statements").fetchall() == []
            assert other.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'").fetchall() == []
            settings = other.execute("SELECT name FROM pg_settings WHERE source IN ('session', 'client')").fetchall()
            assert {name for (name,) in settings} <= PGBOUNCERS_OWN
    assert service.stop() == 0


Break = Callable[[PgBouncer, Postgres], object]
TERMINATE = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'todo_api'"
OUTAGES: dict[str, tuple[Break, Break]] = {
    "connections terminated": (lambda _, server: query(server, TERMINATE), lambda _, server: query(server, TERMINATE)),
    "PgBouncer killed": (lambda pooler, _: pooler.kill(), lambda pooler, _: pooler.start()),
    "PostgreSQL killed": (lambda _, server: server.kill(), lambda _, server: server.start()),
    "PgBouncer frozen": (
        lambda pooler, _: pooler.process.send_signal(signal.SIGSTOP),
        lambda pooler, _: pooler.process.send_signal(signal.SIGCONT),
    ),
    "PgBouncer paused": (
        lambda pooler, _: pooler.console("PAUSE"),
        lambda pooler, _: pooler.console("RESUME"),
    ),
}


LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in OUTAGES if not kind.endswith("killed")]


@pytest.mark.parametrize("kind", ["PgBouncer killed", "PostgreSQL killed", *LONG])
def test_requests_get_a_quick_503_during_an_outage_and_no_task_is_lost(
    kind: str, service: Service, bouncer: PgBouncer, postgres: Postgres, figure: Figure
) -> None:
    away, back = OUTAGES[kind]
    with Load(service, 40) as load:
        time.sleep(0.5)
        away(bouncer, postgres)
        noticed = time.monotonic() + 1.5
        time.sleep(4)
        back(bouncer, postgres)
        wait_until(lambda: can_connect(bouncer, postgres))
        returned = time.monotonic()
        load.first_success(returned)
        time.sleep(0.5)

    assert set(load.statuses()) <= {201, 503}
    # Measured by the clients, with the wait for a thread, after the outage is noticed.
    waits = [call.ended - call.started for call in load.calls if noticed < call.started < noticed + 1]
    figure(f"behind PgBouncer, {kind}: slowest 503 (s)", round(max(service.took(503), default=0), 2))
    figure(f"behind PgBouncer, {kind}: median response, as clients see it (s)", round(median(waits), 2))
    figure(f"behind PgBouncer, {kind}: first success after (s)", round(load.first_success(returned), 2))
    assert_quick(service)
    assert len(waits) > 40  # in this second each client had more than one response
    assert load.failing_seconds(returned) < 1
    assert_acknowledged_once(load.calls, postgres.conninfo)
    assert "Traceback" not in service.log()


def can_connect(bouncer: PgBouncer, postgres: Postgres) -> bool:
    """Return whether a PgBouncer has a connection to PostgreSQL, or can open one."""
    try:
        with psycopg.connect(bouncer.in_front_of(postgres.conninfo)) as db:
            db.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


SLOW = """
    CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3); RETURN new; END';
    CREATE TRIGGER sleep AFTER UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION sleep()
"""
AT_WORK = "SELECT pid FROM pg_stat_activity WHERE application_name = 'todo_api' AND state <> 'idle'"


def test_a_change_of_a_locked_task_gets_a_503_and_has_no_effect(service: Service, postgres: Postgres) -> None:
    task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("SELECT 1 FROM tasks FOR UPDATE")
        assert_undone(service, postgres, task)
    assert service.client.get(f"/api/tasks/{task['id']}").json() == task
    assert service.client.post(f"/api/tasks/{task['id']}/toggle").status_code == httpx.codes.OK


def test_a_locked_task_is_noticed_if_the_login_role_begins_as_another_role(postgres: Postgres, start: Start) -> None:
    query(postgres, "CREATE ROLE shop_owner")
    query(postgres, "CREATE ROLE rotated LOGIN IN ROLE shop_owner")
    query(postgres, "ALTER ROLE rotated SET role = shop_owner")
    query(postgres, "CREATE DATABASE rotating OWNER shop_owner")
    direct = make_conninfo(postgres.conninfo, dbname="rotating")
    with pgbouncer.running(make_conninfo(direct, user="rotated")) as bouncer:
        settings = {"DATABASE_POOLER": True, "DATABASE_ROLE": "", "WEB_CONCURRENCY": 1}
        service = start(DATABASE_URL=as_url(bouncer.in_front_of(direct)), **settings).wait()
        task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
        with psycopg.connect(direct) as db:
            db.execute("SELECT 1 FROM tasks FOR UPDATE")
            response = service.client.post(f"/api/tasks/{task['id']}/toggle", timeout=30)  # a statement may take 60 s
            assert_problem(response, 503, "database_unavailable")
        assert_quick(service)
        assert service.stop() == 0


def test_a_long_statement_is_answered(service: Service, postgres: Postgres) -> None:
    task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    query(postgres, SLOW)
    assert service.client.post(f"/api/tasks/{task['id']}/toggle").status_code == httpx.codes.OK
    query(postgres, "DROP FUNCTION sleep CASCADE")
    assert service.client.get(f"/api/tasks/{task['id']}").json()["version"] == 2


def test_slow_statements_on_all_connections_of_the_pooler_are_answered_or_get_a_quick_503(
    service: Service, postgres: Postgres
) -> None:
    tasks = [service.client.post("/api/tasks", json={"title": "Buy milk"}).json() for _ in range(8)]
    paths = [f"/api/tasks/{task['id']}" for task in tasks]
    query(postgres, SLOW)
    responses = at_once(service, 8, lambda client, number: client.post(f"{paths[number]}/toggle"))
    wait_until(lambda: query(postgres, AT_WORK) == [])
    query(postgres, "DROP FUNCTION sleep CASCADE")
    service.wait()
    for task, path, response in zip(tasks, paths, responses, strict=True):
        # After a 503 a client does not know whether the change was done. It is never done twice.
        now = service.client.get(path).json()
        if response.status_code == httpx.codes.OK:
            assert response.json() == now
        else:
            assert_problem(response, 503, "database_unavailable")
        assert now["version"] == task["version"] + now["completed"]
        assert service.client.post(f"{path}/toggle").json()["version"] == now["version"] + 1
    assert_quick_after_signs_of_life(service)
    assert "Traceback" not in service.log()


def assert_quick_after_signs_of_life(service: Service) -> None:
    """Check that each 503 came within a second after the request began, or after PgBouncer last had a free connection.

    It has one after each response. If the service asked at that moment, it found out that PostgreSQL is at work.
    """
    ends = [end for _, end in service.periods()]
    for begin, end in service.periods("503"):
        freed = [other for other in ends if begin < other < end - 0.5]  # it takes 0.68 s to fail after that
        assert service.processed(max([begin, *freed]), end) < 1


def test_while_another_application_has_all_connections_of_the_pooler_calls_get_a_quick_503_and_have_no_effect(
    service: Service, bouncer: PgBouncer, postgres: Postgres
) -> None:
    tasks = [service.client.post("/api/tasks", json={"title": "Buy milk"}).json() for _ in range(8)]
    paths = [f"/api/tasks/{task['id']}" for task in tasks]
    with ExitStack() as stack:
        for _ in range(2):
            other = stack.enter_context(psycopg.connect(bouncer.in_front_of(postgres.conninfo)))
            other.execute("SELECT 1")  # begins a transaction, for which PgBouncer reserves a connection
        for response in at_once(service, 8, lambda client, number: client.post(f"{paths[number]}/toggle")):
            assert_problem(response, 503, "database_unavailable")
        assert_quick(service)
    service.wait()
    for task, path in zip(tasks, paths, strict=True):
        assert service.client.get(path).json() == task
        assert service.client.post(f"{path}/toggle").json()["version"] == task["version"] + 1


def assert_undone(service: Service, postgres: Postgres, task: dict[str, Any]) -> None:
    """Check that a toggle gets a quick 503, and that PostgreSQL soon cancels its statement."""
    assert_problem(service.client.post(f"/api/tasks/{task['id']}/toggle"), 503, "database_unavailable")
    wait_until(lambda: query(postgres, AT_WORK) == [])
    assert_quick(service)


@pytest.mark.parametrize("settings", [{}, {"ignore_startup_parameters": "options"}], ids=str)
def test_without_database_pooler_the_start_stops_with_one_line_that_names_it(
    settings: dict[str, str], postgres: Postgres, start: Start
) -> None:
    with pgbouncer.running(postgres.conninfo, **settings) as bouncer:
        for _ in range(2):  # the first start must leave nothing on the pooler's connection to the server
            refused = start(DATABASE_URL=url(bouncer, postgres), DATABASE_POOLER=False)
            assert refused.process.wait(timeout=120) != 0
            assert re.fullmatch("todo_api: .*DATABASE_POOLER=true.*\n", refused.log())


def test_migrations_are_applied_through_migration_database_url(postgres: Postgres, start: Start) -> None:
    query(postgres, "CREATE ROLE app LOGIN")  # it may not create tables
    query(postgres, "CREATE DATABASE shop")
    query(postgres, "ALTER DEFAULT PRIVILEGES GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO app", "shop")
    direct = make_conninfo(postgres.conninfo, dbname="shop")
    with pgbouncer.running(make_conninfo(direct, user="app")) as bouncer:
        settings = {"DATABASE_URL": as_url(bouncer.in_front_of(direct)), "DATABASE_POOLER": True}
        refused = start(**settings, DATABASE_ROLE="")
        assert refused.process.wait(timeout=120) != 0
        assert re.fullmatch("todo_api: .*permission denied.*MIGRATION_DATABASE_URL.*\n", refused.log())
        service = start(**settings, MIGRATION_DATABASE_URL=as_url(direct)).wait()
        assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
        assert service.stop() == 0
