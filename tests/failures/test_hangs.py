"""A database that does not respond: locks, long statements, a suspended server, a frozen network."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest

from tests.support.databases import as_url
from tests.support.load import Load, assert_acknowledged_once, assert_unavailable
from tests.support.network import Network, NetworkPostgres, NetworkService
from tests.support.postgres import Postgres
from tests.support.problems import assert_problem, assert_quick
from tests.support.processes import send, servers_in, wait_until
from tests.support.service import Service

WRITES = ["PATCH", "DELETE", "toggle"]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    server = Postgres(tmp_path_factory.mktemp("near") / "server")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def service(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service of one worker on it."""
    log = tmp_path_factory.mktemp("near") / "log"
    with running(Service(log, DATABASE_URL=as_url(postgres.conninfo), WEB_CONCURRENCY=1)) as service:
        yield service


@pytest.fixture(scope="module")
def network_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkPostgres]:
    """Run a PostgreSQL in a network that can be frozen."""
    server = NetworkPostgres(tmp_path_factory.mktemp("far") / "server", Network())
    yield server
    server.stop()
    server.network.end()


@pytest.fixture(scope="module")
def network_service(network_postgres: NetworkPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service of one worker that reaches the PostgreSQL through that network."""
    with running(NetworkService(tmp_path_factory.mktemp("far") / "log", network_postgres)) as service:
        yield service


@contextmanager
def running(service: Service) -> Iterator[Service]:
    """Wait until a service can reach its database. Stop the service at the end of the block."""
    try:
        yield service.wait()
    finally:
        assert service.stop() == 0


def create_only_task(service: Service, postgres: Postgres) -> dict[str, Any]:
    """Delete all tasks, then create one and return it."""
    delete_tasks(postgres)
    task: dict[str, Any] = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    return task


def delete_tasks(postgres: Postgres) -> None:
    """Delete all tasks."""
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("DELETE FROM tasks")


def change(service: Service, task: dict[str, Any], kind: str) -> httpx.Response:
    """Send a change of one of the kinds in WRITES, and return the response."""
    method, path = ("POST", "/toggle") if kind == "toggle" else (kind, "")
    body = {"title": "Buy bread"} if kind == "PATCH" else None
    return service.client.request(method, f"/api/tasks/{task['id']}{path}", json=body)


def assert_unchanged(service: Service, postgres: Postgres, task: dict[str, Any]) -> None:
    """Wait until no statement is in progress, and check that a task is unchanged and is the only one."""
    wait_until(lambda: not backends(postgres, "active"))
    assert service.client.get("/api/tasks").json() == [task]


def backends(postgres: Postgres, state: str = "%") -> dict[int, object]:
    """Return the ids of the server's processes for the service, with the start of each one's last statement."""
    query = "SELECT pid, query_start FROM pg_stat_activity WHERE application_name = 'todo_api' AND state LIKE %s"
    with psycopg.connect(postgres.conninfo) as db:
        return dict(db.execute(query, [state]).fetchall())


@pytest.mark.parametrize("lock", ["SELECT 1 FROM tasks FOR UPDATE", "LOCK TABLE tasks"])
def test_a_change_that_waits_for_a_lock_gets_a_503_and_has_no_effect(
    lock: str, postgres: Postgres, service: Service
) -> None:
    task = create_only_task(service, postgres)
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(lock.encode())
        for kind in WRITES:
            assert_problem(change(service, task, kind), 503, "database_unavailable")
    assert_quick(service)
    assert_unchanged(service, postgres, task)
    assert change(service, task, "toggle").status_code == httpx.codes.OK


def test_a_long_statement_is_answered(postgres: Postgres, service: Service) -> None:
    task = create_only_task(service, postgres)
    body, key = {"title": "Buy bread"}, {"Idempotency-Key": "5f0c2a7e"}
    with slow_changes(postgres):
        for kind in ("toggle", "PATCH", "DELETE"):
            assert change(service, task, kind).status_code == httpx.codes.OK
        created = service.client.post("/api/tasks", json=body, headers=key)
        assert created.status_code == httpx.codes.CREATED
    assert service.client.get("/api/tasks").json() == [created.json()]


@contextmanager
def slow_changes(postgres: Postgres) -> Iterator[None]:
    """Make each change of a task take 2 s, after the row is changed."""
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute(
            "CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(2); RETURN NULL; END';"
            "CREATE TRIGGER sleep AFTER INSERT OR UPDATE OR DELETE ON tasks FOR EACH ROW EXECUTE FUNCTION sleep()"
        )
        try:
            yield
        finally:
            db.execute("DROP FUNCTION sleep CASCADE")


def test_requests_get_a_503_while_the_server_is_suspended(postgres: Postgres, service: Service) -> None:
    delete_tasks(postgres)
    with Load(service, 50) as load:
        time.sleep(1)
        stopped = servers_in(postgres.cluster)
        send(signal.SIGSTOP, *stopped)
        time.sleep(2)
        wait_until(lambda: load.statuses()[503] > 0)
        send(signal.SIGCONT, *stopped)
        load.first_success(time.monotonic())
    assert_only_unavailable(load)
    assert_quick(service)
    assert_acknowledged_once(load.calls, postgres.conninfo)


def test_requests_get_a_503_while_the_network_is_frozen(
    network_postgres: NetworkPostgres, network_service: Service
) -> None:
    delete_tasks(network_postgres)
    with Load(network_service, 50) as load:
        time.sleep(1)
        before = backends(network_postgres)
        network_postgres.network.freeze()
        time.sleep(3)
        wait_until(lambda: load.statuses()[503] > 0)
        network_postgres.network.thaw()
        load.first_success(time.monotonic())
    assert_only_unavailable(load)
    assert_quick(network_service, 3)
    assert max(network_service.took(201)) < 3
    assert_acknowledged_once(load.calls, network_postgres.conninfo)
    wait_until(lambda: not set(before) & set(backends(network_postgres)))


def test_a_statement_that_a_frozen_network_has_lost_is_never_executed(
    network_postgres: NetworkPostgres, network_service: Service
) -> None:
    task = create_only_task(network_service, network_postgres)
    for _ in range(8):  # so that each connection has prepared the statement, which is then in the first packet
        task = change(network_service, task, "toggle").json()
    before = backends(network_postgres)
    network_postgres.network.freeze()
    assert_problem(change(network_service, task, "toggle"), 503, "database_unavailable")
    network_postgres.network.thaw()
    wait_until(network_service.answers)
    time.sleep(2)  # in this time the kernel would retransmit the lost packets
    assert_unchanged(network_service, network_postgres, task)
    wait_until(lambda: not set(before) & set(backends(network_postgres)))


def test_a_statement_in_progress_when_the_network_freezes_has_no_effect(
    network_postgres: NetworkPostgres, network_service: Service
) -> None:
    task = create_only_task(network_service, network_postgres)
    with psycopg.connect(network_postgres.conninfo) as db, ThreadPoolExecutor() as client:
        db.execute("SELECT 1 FROM tasks FOR UPDATE")
        response = client.submit(change, network_service, task, "toggle")
        wait_until(lambda: bool(backends(network_postgres, "active")))
        before = backends(network_postgres)
        network_postgres.network.freeze()
        assert_problem(response.result(), 503, "database_unavailable")
        wait_until(lambda: not backends(network_postgres, "active"))
    assert_quick(network_service, 3)
    network_postgres.network.thaw()
    wait_until(network_service.answers)
    assert_unchanged(network_service, network_postgres, task)
    assert change(network_service, task, "toggle").json()["version"] == 2
    assert not {pid for pid, used in backends(network_postgres).items() if before.get(pid, used) != used}


def test_no_request_fails_after_the_network_has_forgotten_idle_connections(
    network_postgres: NetworkPostgres, network_service: Service
) -> None:
    query = "SELECT client_port FROM pg_stat_activity WHERE application_name = 'todo_api'"
    with psycopg.connect(network_postgres.conninfo) as db:
        network_postgres.network.forget(port for (port,) in db.execute(query))
    time.sleep(4)
    for _ in range(8):
        assert network_service.client.get("/api/tasks").status_code == httpx.codes.OK
    network_postgres.network.thaw()


def assert_only_unavailable(load: Load) -> None:
    """Check that there were successes and 503s, and that each 503 is the right problem."""
    assert set(load.statuses()) == {201, 503}
    for call in filter(lambda call: call.status == 503, load.calls):
        assert_unavailable(call)
