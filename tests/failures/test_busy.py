"""Busy threads and slow statements are no outage. A request waits for them, but not for a server that hangs."""

import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.databases import as_url
from tests.support.fixtures import Figure, Start
from tests.support.load import at_once
from tests.support.network import Network, NetworkPostgres, NetworkService
from tests.support.postgres import Postgres, admit_all_roles
from tests.support.problems import assert_problem
from tests.support.processes import free_port, postmaster_in, send, servers_in, wait_until
from tests.support.service import Service, workers

GUNICORN = [sys.executable, "-m", "gunicorn", "--threads", "16", "wsgi:app"]
COMMANDS = {
    "python wsgi.py --threads 16": [sys.executable, "wsgi.py", "--threads", "16"],
    "gunicorn --threads 16 wsgi:app": GUNICORN,
}


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    running = Postgres(tmp_path / "server")
    yield running
    running.stop()


@pytest.fixture
def network_postgres(tmp_path: Path) -> Iterator[NetworkPostgres]:
    """Run a PostgreSQL in a network of its own."""
    running = NetworkPostgres(tmp_path / "server", Network())
    yield running
    running.stop()
    running.network.end()


@pytest.fixture
def network_service(network_postgres: NetworkPostgres, tmp_path: Path) -> Iterator[Service]:
    """Run a service that reaches the PostgreSQL through that network."""
    running = NetworkService(tmp_path / "log", network_postgres)
    yield running.wait()
    assert running.stop() == 0


def create(service: Service, title: str) -> str:
    """Create a task and return its path."""
    return f"/api/tasks/{service.client.post('/api/tasks', json={'title': title}).json()['id']}"


@pytest.mark.parametrize("command", COMMANDS)
def test_requests_that_wait_for_a_lock_leave_connections_for_other_requests(
    command: str, postgres: Postgres, start: Start
) -> None:
    port = free_port()
    bind = [] if "wsgi.py" in command else ["--bind", f"127.0.0.1:{port}", "--no-control-socket"]
    arguments = [*COMMANDS[command][:3], *bind, *COMMANDS[command][3:]]
    service = start(DATABASE_URL=as_url(postgres.conninfo), PORT=port, command=arguments).wait()
    locked, free = create(service, "locked"), create(service, "free")
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("SELECT 1 FROM tasks WHERE title = 'locked' FOR UPDATE")
        for _ in range(3):
            assert_served_beside_waiting_toggles(service, postgres, locked, free)
    assert "cannot be reached" not in service.log()
    assert service.stop() == 0


def assert_served_beside_waiting_toggles(service: Service, postgres: Postgres, locked: str, free: str) -> None:
    """Check that a task can be read while twelve clients toggle a locked one."""
    with ThreadPoolExecutor() as clients:
        toggles = clients.submit(at_once, service, 12, lambda client, _: client.post(f"{locked}/toggle"))
        wait_until(lambda: toggles.done() or locks_waited_for(postgres) >= 4)
        while not toggles.done():
            assert service.client.get(free).status_code == httpx.codes.OK
        for response in toggles.result():
            assert_problem(response, 503, "database_unavailable")


def locks_waited_for(postgres: Postgres) -> int:
    """Return the number of sessions that wait for a lock."""
    with psycopg.connect(postgres.conninfo) as db:
        return len(db.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'").fetchall())


MANY_SEARCHED = """
    INSERT INTO tasks (user_id, title, description)
    SELECT 'local', 'number ' || n, repeat(md5(n::text) || ' ', 15) FROM generate_series(1, %s) AS n
"""


@pytest.mark.long
def test_four_concurrent_searches_through_a_million_tasks_succeed(
    postgres: Postgres, start: Start, figure: Figure
) -> None:
    service = start(DATABASE_URL=as_url(postgres.conninfo)).wait()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(MANY_SEARCHED.replace("%s", "1000000").encode())
    began = time.monotonic()
    responses = at_once(service, 4, lambda client, _: client.get("/api/tasks", params={"q": "nowhere"}, timeout=120))
    figure("four searches through 1 000 000 tasks, s", round(time.monotonic() - began, 1))
    assert [response.status_code for response in responses] == [200] * 4
    assert [response.json() for response in responses] == [[]] * 4
    assert service.stop() == 0


LARGEST_CHARACTER = "\U0001f600"  # four bytes in UTF-8
LARGEST = """
    INSERT INTO tasks (user_id, title, description)
    SELECT 'local', lpad('.' || n, 200, U&'\\+01F600'), repeat(U&'\\+01F600', 2000) FROM generate_series(1, 10000) AS n
"""


@pytest.mark.long
def test_10_000_of_the_largest_tasks_arrive_completely_over_a_slow_link(
    network_postgres: NetworkPostgres, network_service: Service, figure: Figure
) -> None:
    with psycopg.connect(network_postgres.conninfo) as db:
        db.execute(LARGEST.encode())
    network_postgres.network.slow_down("30mbit")
    began = time.monotonic()
    response = network_service.client.get("/api/tasks", timeout=120)
    figure("10 000 of the largest tasks at 30 Mbit/s, s", round(time.monotonic() - began, 1))
    assert response.status_code == httpx.codes.OK
    tasks = response.json()
    assert [task["title"].lstrip(LARGEST_CHARACTER) for task in tasks] == [f".{n}" for n in range(10_000, 0, -1)]
    assert {(len(task["title"]), task["description"]) for task in tasks} == {(200, LARGEST_CHARACTER * 2000)}


LARGEST_IN_JSON = LARGEST.replace("U&'\\+01F600'", "E'\\x01'")  # JSON escapes this character with six bytes
LARGEST_PAGE = 96 * 1024 * 1024  # bytes


def test_a_page_ends_before_it_gets_too_large_and_leaves_little_memory_in_use(
    postgres: Postgres, start: Start, figure: Figure
) -> None:
    service = start(DATABASE_URL=as_url(postgres.conninfo)).wait()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute(LARGEST_IN_JSON.encode())
    [worker] = workers(service)
    before = worker.memory_info().rss
    titles, url = [], "/api/tasks"
    while url:
        response = service.client.get(url, timeout=120)
        assert response.status_code == httpx.codes.OK
        assert len(response.content) <= LARGEST_PAGE
        titles += [task["title"].lstrip("\x01") for task in response.json()]
        url = response.links.get("next", {}).get("url", "")
    assert titles == [f".{n}" for n in range(10_000, 0, -1)]

    for _ in range(6):
        assert service.client.get("/api/tasks", timeout=120).status_code == httpx.codes.OK
    kept = (worker.memory_info().rss - before) // 2**20
    figure("memory that a worker keeps after lists of the largest tasks, MiB", kept)
    assert kept < 400
    assert service.stop() == 0


SLOW_READS = """
    ALTER TABLE tasks RENAME TO stored;
    CREATE FUNCTION slow() RETURNS boolean LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(%s); RETURN TRUE; END';
    CREATE VIEW tasks AS SELECT * FROM stored WHERE slow();
    GRANT SELECT ON tasks TO todo_app
"""


def test_a_server_that_is_suspended_during_a_slow_statement_causes_a_quick_503(
    postgres: Postgres, start: Start, figure: Figure
) -> None:
    service = start(DATABASE_URL=as_url(postgres.conninfo)).wait()
    create(service, "Buy milk")
    with psycopg.connect(postgres.conninfo) as db:
        db.execute((SLOW_READS % 10).encode())
    with ThreadPoolExecutor() as client:
        lists = [client.submit(service.client.get, "/api/tasks") for _ in range(4)]
        time.sleep(2)
        stopped = servers_in(postgres.cluster)
        send(signal.SIGSTOP, *stopped)
        suspended = time.monotonic()
        for answer in lists:
            assert_problem(answer.result(), 503, "database_unavailable")
        took = time.monotonic() - suspended
        send(signal.SIGCONT, *stopped)
    figure("PostgreSQL suspended during slow statements: slowest 503, s", f"{took:.2f}")
    assert took < 8  # which is before the statements would have ended
    wait_until(service.answers)
    assert len(service.client.get("/api/tasks").json()) == 1
    assert service.stop() == 0


def test_a_statement_that_takes_too_long_ends_at_the_statement_timeout(postgres: Postgres, start: Start) -> None:
    url = as_url(f"{postgres.conninfo} options='-c statement_timeout=2s'")
    service = start(DATABASE_URL=url).wait()
    create(service, "Buy milk")
    with psycopg.connect(postgres.conninfo) as db:
        db.execute((SLOW_READS % 30).encode())
    assert_problem(service.client.get("/api/tasks"), 503, "database_unavailable")
    assert "QueryCanceled (SQLSTATE 57014)" in service.log()
    assert "cannot be reached" not in service.log()
    assert service.stop() == 0


def test_missing_tables_cause_503s_and_one_log_line_until_they_are_back(postgres: Postgres, start: Start) -> None:
    service = start(DATABASE_URL=as_url(postgres.conninfo)).wait()
    path = create(service, "Buy milk")
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("ALTER TABLE tasks RENAME TO gone")
    for _ in range(3):
        for url in ("/readyz", "/api/tasks", path):
            assert_problem(service.client.get(url), 503, "database_unavailable")
    assert service.log().count('relation "tasks" does not exist') == 1
    assert "Traceback" not in service.log()
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("ALTER TABLE gone RENAME TO tasks")
    for url in ("/readyz", "/api/tasks", path):
        assert service.client.get(url).status_code == httpx.codes.OK
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("DROP TABLE idempotency_keys")
    assert_problem(service.client.get("/readyz"), 503, "database_unavailable")
    assert service.client.get(path).status_code == httpx.codes.OK
    assert service.stop() == 0


def test_a_worker_that_starts_without_a_free_connection_returns_503s(tmp_path: Path, start: Start) -> None:
    data_dir = tmp_path.resolve() / "data"
    service = start(DATA_DIR=data_dir, WEB_THREADS=64).wait()
    admin = admit_all_roles(data_dir / "postgres", postmaster_in(data_dir))
    with psycopg.connect(admin) as db:
        [[allowed]] = db.execute("SHOW max_connections").fetchall()
    assert int(allowed) >= 2 * 64 + 10  # enough for a reload
    [worker] = workers(service)
    service.process.send_signal(signal.SIGSTOP)  # so that the next worker starts when all connections are taken
    worker.kill()
    with ExitStack() as others:
        for _ in range(int(allowed)):
            others.enter_context(closing(connect_once_possible(admin)))
        service.process.send_signal(signal.SIGCONT)
        wait_until(lambda: [w.pid for w in workers(service)] not in ([], [worker.pid]))
        for _ in range(20):
            assert_problem(service.client.get("/api/tasks"), 503, "database_unavailable")
        assert "too many clients already" in service.log()
        assert "createdb" not in service.log()
        assert service.process.poll() is None, service.log()
    service.wait()
    assert service.stop() == 0


def connect_once_possible(conninfo: str) -> psycopg.Connection[TupleRow]:
    """Return a connection after waiting until the server allows one more."""
    while True:
        try:
            return psycopg.connect(conninfo)
        except psycopg.OperationalError:
            time.sleep(0.05)
