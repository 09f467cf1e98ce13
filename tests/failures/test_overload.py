"""More clients than can be served at once: they wait or get a quick 503, nothing is lost, memory stays bounded."""

import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support.databases import as_url
from tests.support.fixtures import Figure, Start
from tests.support.load import Crowd, Load, assert_unavailable
from tests.support.postgres import TERMINATE, Postgres, connections
from tests.support.problems import assert_quick
from tests.support.processes import wait_until
from tests.support.service import Service, workers

MANY_TASKS = "INSERT INTO tasks (user_id, title) SELECT 'local', 'one of many' FROM generate_series(1, 10000)"
LIST = b"GET /api/tasks HTTP/1.1\r\nHost: todo\r\n\r\n"
HALF_A_HEAD = b"POST /api/tasks HTTP/1.1\r\nHo"
HALF_A_BODY = b"POST /api/tasks HTTP/1.1\r\nHost: todo\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n{"
LEAVING = b"GET /healthz HTTP/1.1\r\nHost: todo\r\nConnection: close\r\n\r\n"
# What many systems start programs with, and what the clients here need for themselves.
SOFT_LIMIT = ["sh", "-c", 'ulimit -Sn "$0" && exec "$@"']
FILES = 4096


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    running = Postgres(tmp_path_factory.mktemp("overload") / "server")
    yield running
    running.stop()


@pytest.fixture
def url(postgres: Postgres, start: Start) -> str:
    """Give the URL of a database without tasks."""
    assert start(DATABASE_URL=as_url(postgres.conninfo)).wait().stop() == 0
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("DELETE FROM tasks")
    return as_url(postgres.conninfo)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process open as many files as it needs for its clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(service: Service, count: int, data: bytes = b"", *, window: int = 0) -> ExitStack:
    """Open connections and send the same on each; with a window the client's side holds only so many bytes."""
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.settimeout(30)
            if window:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
            client.connect(("127.0.0.1", service.port))
            client.sendall(data)
        return stack.pop_all()


def peaks(service: Service) -> list[int]:
    """Give the most memory that each worker ever had, in KiB."""
    statuses = [Path(f"/proc/{worker.pid}/status").read_text(encoding="ascii") for worker in workers(service)]
    return [int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) for status in statuses]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_500_clients_lose_no_write_and_need_little_memory(
    processes: int, url: str, postgres: Postgres, start: Start, figure: Figure
) -> None:
    service = start(DATABASE_URL=url, WEB_CONCURRENCY=processes).wait()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(MANY_TASKS)
    wait_until(lambda: len(workers(service)) == processes)
    service.client.get("/api/tasks")
    before = max(peaks(service))
    with Crowd(service, 500, ("create",) * 30 + ("toggle", "get") * 10 + ("list",)) as crowd:
        time.sleep(6)
    grown = (max(peaks(service)) - before) // 1024
    figure(f"500 clients, {processes} workers: answers", str(dict(crowd.statuses())))
    figure(f"500 clients, {processes} workers: a worker grows by at most, MiB", grown)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) <= {200, 201, 503}
    assert crowd.statuses()[503] < len(crowd.exchanges) / 100  # where a busy machine lets a statement time out
    assert_quick(service)
    assert grown < 100
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("DELETE FROM tasks WHERE title = 'one of many'")
    crowd.assert_nothing_lost(postgres.conninfo)
    assert service.stop() == 0


@pytest.mark.long
def test_500_lists_of_10_000_tasks_at_once_need_the_memory_of_a_few(
    url: str, postgres: Postgres, start: Start, figure: Figure
) -> None:
    service = start(DATABASE_URL=url).wait()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(MANY_TASKS)
    service.client.get("/api/tasks")
    before = max(peaks(service))
    with connect(service, 250, LIST, window=4096), Crowd(service, 250, ("list",)) as crowd:
        wait_until(lambda: crowd.statuses()[200] >= 250)
    grown = (max(peaks(service)) - before) // 1024
    figure("500 lists of 10 000 tasks, half of them not read: a worker grows by at most, MiB", grown)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) <= {200, 503}
    assert grown < 100
    wait_until(service.answers)
    assert service.stop() == 0


def test_1500_clients_fit_where_the_limit_of_open_files_is_1024(
    many_files: None, url: str, postgres: Postgres, start: Start
) -> None:
    service = start(DATABASE_URL=url, WEB_THREADS=16, prefix=[*SOFT_LIMIT, "1024"]).wait()
    [worker] = workers(service)
    with Crowd(service, 1500, ("create", "get")) as crowd:
        wait_until(lambda: sum(exchange.first for exchange in crowd.exchanges) >= 1500)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) == {200, 201}
    crowd.assert_nothing_lost(postgres.conninfo)
    postgres.kill()
    wait_until(lambda: not service.answers())
    with connect(service, 1500, b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n"):
        wait_until(lambda: worker.num_fds() > 1500)
        postgres.start()  # the service's connections now have higher numbers than select() knows
        wait_until(service.answers)
        assert {service.client.get("/api/tasks?limit=1").status_code for _ in range(50)} == {200}
    assert workers(service) == [worker]
    assert service.stop() == 0


def test_a_low_limit_that_cannot_be_raised_makes_clients_wait_and_kills_nobody(
    url: str, postgres: Postgres, start: Start
) -> None:
    limit = ["sh", "-c", 'ulimit -n "$0" && exec "$@"', "256"]
    service = start(DATABASE_URL=url, prefix=limit).wait()
    [worker] = workers(service)
    with Crowd(service, 300) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 1000)
        with connect(service, 100):
            time.sleep(0.5)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) == {201}
    assert workers(service) == [worker]
    crowd.assert_nothing_lost(postgres.conninfo)


@pytest.mark.parametrize("left", [HALF_A_HEAD, HALF_A_BODY, LIST * 8])
@pytest.mark.long
def test_clients_that_halt_hold_no_thread_for_ever(left: bytes, url: str, postgres: Postgres, start: Start) -> None:
    service = start(DATABASE_URL=url).wait()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(MANY_TASKS)
    with connect(service, 4, left, window=4096):
        time.sleep(1)
        assert service.client.get("/healthz", timeout=60).status_code == httpx.codes.OK


def test_clients_that_are_slow_to_close_keep_nobody_waiting(url: str, start: Start) -> None:
    service = start(DATABASE_URL=url).wait()
    with connect(service, 30, LEAVING):  # gunicorn's own worker waits 2 s for each, one after the other
        moment = time.monotonic()
        for _ in range(10):
            assert httpx.get(f"{service.url}/healthz", timeout=60, verify=False).status_code == httpx.codes.OK
        assert time.monotonic() - moment < 10
    assert service.stop() == 0


@pytest.mark.long
def test_clients_that_never_ask_do_not_delay_a_stop(url: str, start: Start) -> None:
    service = start(DATABASE_URL=url).wait()
    with connect(service, 3):
        time.sleep(6)  # by then gunicorn no longer waits in a thread for each
        moment = time.monotonic()
        assert service.stop() == 0
    assert time.monotonic() - moment < 8  # graceful_timeout is 10


def test_while_postgresql_is_out_of_connections_requests_get_a_quick_503(
    url: str, postgres: Postgres, start: Start
) -> None:
    service = start(DATABASE_URL=url).wait()
    with ExitStack() as others:
        take_all_connections(postgres, others)
        with Load(service, 50) as load:
            wait_until(lambda: load.statuses().total() > 1000)
    for call in load.calls:
        assert_unavailable(call)
    assert_quick(service)
    wait_until(service.answers)
    with Load(service, 8) as load:
        wait_until(lambda: connections(postgres) == 4)  # as many as before
    assert set(load.statuses()) == {201}
    assert service.stop() == 0


def take_all_connections(postgres: Postgres, held: ExitStack) -> None:
    """End the service's connections, and take all until PostgreSQL has no others, not even one that is still ending."""
    watching = held.enter_context(psycopg.connect(postgres.conninfo, autocommit=True))
    count = 1

    def all_are_held() -> bool:
        nonlocal count
        watching.execute(TERMINATE)
        with suppress(psycopg.OperationalError):
            while True:
                held.enter_context(psycopg.connect(postgres.conninfo))
                count += 1
        there = watching.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
        return there.fetchone() == (count,)

    wait_until(all_are_held)


def test_fewer_connections_than_threads_are_enough(url: str, postgres: Postgres, start: Start) -> None:
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 3")
        db.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO few")
    few = as_url(make_conninfo(postgres.conninfo, user="few"))
    service = start(DATABASE_URL=few, MIGRATION_DATABASE_URL=url, WEB_THREADS=16).wait()
    with Load(service, 16) as load:
        wait_until(lambda: load.statuses().total() > 1000)
    assert set(load.statuses()) == {201}
    assert "503 until" not in service.log()
    assert service.stop() == 0
