"""The database is there and does not answer: locks, long statements, a server that is stopped, a frozen network."""

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
from tests.support.processes import servers_in, wait_until
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
def far_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkPostgres]:
    """Run a PostgreSQL in a network that can be frozen."""
    server = NetworkPostgres(tmp_path_factory.mktemp("far") / "server", Network())
    yield server
    server.stop()
    server.network.end()


@pytest.fixture(scope="module")
def far_service(far_postgres: NetworkPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service of one worker that reaches it through that network."""
    with running(NetworkService(tmp_path_factory.mktemp("far") / "log", far_postgres)) as service:
        yield service


@contextmanager
def running(service: Service) -> Iterator[Service]:
    """Wait until a service can reach its database, and stop it in the end."""
    try:
        yield service.wait()
    finally:
        assert service.stop() == 0


def only_task(service: Service, postgres: Postgres) -> dict[str, Any]:
    """Create a task, which is then the only one."""
    clear(postgres)
    task: dict[str, Any] = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    return task


def clear(postgres: Postgres) -> None:
    """Delete the tasks that the test before has left."""
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("DELETE FROM tasks")


def write(service: Service, task: dict[str, Any], kind: str) -> httpx.Response:
    """Change a task in one of the ways that there are."""
    method, path = ("POST", "/toggle") if kind == "toggle" else (kind, "")
    body = {"title": "Buy bread"} if kind == "PATCH" else None
    return service.client.request(method, f"/api/tasks/{task['id']}{path}", json=body)


def assert_unchanged(service: Service, postgres: Postgres, task: dict[str, Any]) -> None:
    """Check that nothing has become of a task, and nothing will: no statement is at work any more."""
    wait_until(lambda: not backends(postgres, "active"))
    assert service.client.get("/api/tasks").json() == [task]


def backends(postgres: Postgres, state: str = "%") -> dict[int, object]:
    """Find the server's processes that work for a service, and when each had its last statement."""
    query = "SELECT pid, query_start FROM pg_stat_activity WHERE application_name = 'todo_api' AND state LIKE %s"
    with psycopg.connect(postgres.conninfo) as db:
        return dict(db.execute(query, [state]).fetchall())


@pytest.mark.parametrize("lock", ["SELECT 1 FROM tasks FOR UPDATE", "LOCK TABLE tasks"])
def test_what_is_locked_is_a_503_and_stays_as_it_is(lock: str, postgres: Postgres, service: Service) -> None:
    task = only_task(service, postgres)
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(lock.encode())
        for kind in WRITES:
            assert_problem(write(service, task, kind), 503, "database_unavailable")
    assert_quick(service)
    assert_unchanged(service, postgres, task)
    assert write(service, task, "toggle").status_code == httpx.codes.OK


def test_a_long_statement_is_a_503_and_changes_nothing(postgres: Postgres, service: Service) -> None:
    task = only_task(service, postgres)
    body, key = {"title": "Buy bread"}, {"Idempotency-Key": "5f0c2a7e"}
    with slow_changes(postgres):
        for kind in WRITES:
            assert_problem(write(service, task, kind), 503, "database_unavailable")
        assert_problem(service.client.post("/api/tasks", json=body, headers=key), 503, "database_unavailable")
        assert_unchanged(service, postgres, task)
    assert_quick(service)
    assert service.client.post("/api/tasks", json=body, headers=key).status_code == httpx.codes.CREATED


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


def test_a_server_that_is_stopped_is_a_503_until_it_goes_on(postgres: Postgres, service: Service) -> None:
    clear(postgres)
    with Load(service, 50) as load:
        time.sleep(1)
        stopped = servers_in(postgres.cluster)
        for process in stopped:
            process.suspend()
        time.sleep(2)
        wait_until(lambda: load.statuses()[503] > 0)
        for process in stopped:
            process.resume()
        load.first_success(time.monotonic())
    assert_only_unavailable(load)
    assert_quick(service)
    assert_acknowledged_once(load.calls, postgres.conninfo)


def test_a_frozen_network_is_a_503_until_it_thaws(far_postgres: NetworkPostgres, far_service: Service) -> None:
    clear(far_postgres)
    with Load(far_service, 50) as load:
        time.sleep(1)
        before = backends(far_postgres)
        far_postgres.network.freeze()
        time.sleep(3)
        wait_until(lambda: load.statuses()[503] > 0)
        far_postgres.network.thaw()
        load.first_success(time.monotonic())
    assert_only_unavailable(load)
    assert_quick(far_service, 3)
    assert max(far_service.took(201)) < 3
    assert_acknowledged_once(load.calls, far_postgres.conninfo)
    wait_until(lambda: not set(before) & set(backends(far_postgres)))


def test_what_a_frozen_network_kept_back_is_never_done(far_postgres: NetworkPostgres, far_service: Service) -> None:
    task = only_task(far_service, far_postgres)
    for _ in range(8):  # on each connection, so that it is prepared there: else it is not in the first packet
        task = write(far_service, task, "toggle").json()
    before = backends(far_postgres)
    far_postgres.network.freeze()
    assert_problem(write(far_service, task, "toggle"), 503, "database_unavailable")
    far_postgres.network.thaw()
    wait_until(far_service.answers)
    time.sleep(2)  # for so long the kernel sends again what was lost, unless it is told not to
    assert_unchanged(far_service, far_postgres, task)
    wait_until(lambda: not set(before) & set(backends(far_postgres)))


def test_a_freeze_in_the_middle_of_a_statement_changes_nothing(
    far_postgres: NetworkPostgres, far_service: Service
) -> None:
    task = only_task(far_service, far_postgres)
    with psycopg.connect(far_postgres.conninfo) as db, ThreadPoolExecutor() as client:
        db.execute("SELECT 1 FROM tasks FOR UPDATE")
        answer = client.submit(write, far_service, task, "toggle")
        wait_until(lambda: bool(backends(far_postgres, "active")))
        before = backends(far_postgres)
        far_postgres.network.freeze()
        assert_problem(answer.result(), 503, "database_unavailable")
        wait_until(lambda: not backends(far_postgres, "active"))
    assert_quick(far_service, 3)
    far_postgres.network.thaw()
    wait_until(far_service.answers)
    assert_unchanged(far_service, far_postgres, task)
    assert write(far_service, task, "toggle").json()["version"] == 2
    assert not {pid for pid, used in backends(far_postgres).items() if before.get(pid, used) != used}


def test_idle_connections_that_the_network_forgets_cost_nothing(
    far_postgres: NetworkPostgres, far_service: Service
) -> None:
    query = "SELECT client_port FROM pg_stat_activity WHERE application_name = 'todo_api'"
    with psycopg.connect(far_postgres.conninfo) as db:
        far_postgres.network.forget(port for (port,) in db.execute(query))
    time.sleep(4)
    for _ in range(8):
        assert far_service.client.get("/api/tasks").status_code == httpx.codes.OK
    far_postgres.network.thaw()


def assert_only_unavailable(load: Load) -> None:
    """Check that what was not done was answered with a 503 that says so."""
    assert set(load.statuses()) == {201, 503}
    for call in filter(lambda call: call.status == 503, load.calls):
        assert_unavailable(call)
