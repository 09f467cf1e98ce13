"""More clients than threads: they wait or get a quick 503, no write is lost, and memory stays bounded."""

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
LIST = b"GET /api/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF_A_HEAD = b"POST /api/tasks HTTP/1.1\r\nHo"
HALF_A_BODY = (
    b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n{"
)
CLOSING = b"GET /healthz HTTP/1.1\r\nHost: todo\r\nConnection: close\r\n\r\n"
# Many systems start programs with a soft limit of 1024 open files. The clients of these tests need more.
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
    """Return the URL of a database without tasks."""
    assert start(DATABASE_URL=as_url(postgres.conninfo)).wait().stop() == 0
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("DELETE FROM tasks")
    return as_url(postgres.conninfo)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raise the limit of open files of this process, for its clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(service: Service, count: int, data: bytes = b"", *, window: int = 0) -> ExitStack:
    """Open connections and send the same data on each. ``window`` is the size of the receive buffers in bytes."""
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.settimeout(30)
            if window:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
            client.connect(("127.0.0.1", service.port))
            client.sendall(data)
        return stack.pop_all()


def peak_memory(service: Service) -> list[int]:
    """Return the peak memory of each worker, in KiB."""
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
    before = max(peak_memory(service))
    with Crowd(service, 500, ("create",) * 30 + ("toggle", "get") * 10 + ("list",)) as crowd:
        time.sleep(6)
    growth = (max(peak_memory(service)) - before) // 1024
    figure(f"500 clients, {processes} workers: responses by status", str(dict(crowd.statuses())))
    figure(f"500 clients, {processes} workers: growth of a worker, MiB", growth)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) <= {200, 201, 503}
    assert crowd.statuses()[503] < len(crowd.exchanges) / 100  # a busy machine may let a statement time out
    assert_quick(service)
    assert growth < 100
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("DELETE FROM tasks WHERE title = 'one of many'")
    crowd.assert_nothing_lost(postgres.conninfo)
    assert service.stop() == 0


@pytest.mark.long
def test_500_concurrent_lists_of_10_000_tasks_need_little_memory(
    url: str, postgres: Postgres, start: Start, figure: Figure
) -> None:
    service = start(DATABASE_URL=url).wait()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(MANY_TASKS)
    service.client.get("/api/tasks")
    before = max(peak_memory(service))
    with connect(service, 250, LIST, window=4096), Crowd(service, 250, ("list",)) as crowd:
        wait_until(lambda: crowd.statuses()[200] >= 250)
    growth = (max(peak_memory(service)) - before) // 1024
    figure("500 lists of 10 000 tasks, half of them not read: growth of a worker, MiB", growth)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) <= {200, 503}
    assert growth < 100
    wait_until(service.answers)
    assert service.stop() == 0


def test_1500_clients_are_served_with_a_soft_limit_of_1024_open_files(
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
        postgres.start()  # new connections to it get file descriptors that select() does not support
        wait_until(service.answers)
        assert {service.client.get("/api/tasks?limit=1").status_code for _ in range(50)} == {200}
    assert workers(service) == [worker]
    assert service.stop() == 0


def test_a_low_hard_limit_of_open_files_makes_clients_wait_and_ends_no_worker(
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


@pytest.mark.parametrize("data", [HALF_A_HEAD, HALF_A_BODY, LIST * 8])
@pytest.mark.long
def test_clients_that_stop_sending_or_reading_do_not_block_threads_forever(
    data: bytes, url: str, postgres: Postgres, start: Start
) -> None:
    service = start(DATABASE_URL=url).wait()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(MANY_TASKS)
    with connect(service, 4, data, window=4096):
        time.sleep(1)
        assert service.client.get("/healthz", timeout=60).status_code == httpx.codes.OK


def test_clients_that_are_slow_to_close_do_not_delay_others(url: str, start: Start) -> None:
    service = start(DATABASE_URL=url).wait()
    with connect(service, 30, CLOSING):  # gunicorn's own worker waits up to 2 s for each, in turn
        moment = time.monotonic()
        for _ in range(10):
            assert httpx.get(f"{service.url}/healthz", timeout=60, verify=False).status_code == httpx.codes.OK
        assert time.monotonic() - moment < 10
    assert service.stop() == 0


@pytest.mark.long
def test_connections_without_requests_do_not_delay_a_stop(url: str, start: Start) -> None:
    service = start(DATABASE_URL=url).wait()
    with connect(service, 3):
        time.sleep(6)  # by then no thread of gunicorn waits for these connections
        moment = time.monotonic()
        assert service.stop() == 0
    assert time.monotonic() - moment < 8  # less than the graceful_timeout of 10 s


def test_requests_get_a_quick_503_while_postgresql_is_out_of_connections(
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
        wait_until(lambda: connections(postgres) == 4)  # one per thread, as before
    assert set(load.statuses()) == {201}
    assert service.stop() == 0


def take_all_connections(postgres: Postgres, held: ExitStack) -> None:
    """Terminate all other connections, and open new ones, until PostgreSQL allows no more and has no others."""
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
    assert "statements fail until" not in service.log()
    assert service.stop() == 0
