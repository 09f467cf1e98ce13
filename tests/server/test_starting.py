"""A start with an unavailable or unsuitable database, concurrent starts, and killed starts."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from shutil import copytree
from urllib.parse import quote

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support.databases import as_url
from tests.support.fixtures import Figure, Start
from tests.support.load import assert_unavailable, create
from tests.support.postgres import Postgres
from tests.support.problems import assert_problem, assert_quick
from tests.support.processes import free_port, wait_until
from tests.support.service import Service
from todo_api.database import migrations, statements

PASSWORD = "h-u-s-h"
APPLIED = sorted(path.stem for path in statements.MIGRATIONS.glob("[0-9]*[!k].sql"))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL in which each test creates its own database. A test may stop the server."""
    running = Postgres(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


def query(conninfo: str, sql: str) -> list[str]:
    """Run a statement and return the first value of each row."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return [str(row[0]) for row in cursor] if cursor.description else []


def new_database(postgres: Postgres, name: str) -> str:
    """Create an empty database and return its connection string."""
    if not postgres.answers():
        postgres.start()  # a failed test may have stopped it
    query(postgres.conninfo, f"CREATE DATABASE {name}")
    return make_conninfo(postgres.conninfo, dbname=name)


def applied_migrations(conninfo: str) -> list[str]:
    """Return the names of the applied migrations in yoyo's log, repeated if they are logged repeatedly."""
    joined = "SELECT migration_id FROM _yoyo_migration JOIN _yoyo_log USING (migration_id) ORDER BY 1"
    return query(conninfo, joined)


def lines_with(service: Service, part: str) -> int:
    """Return the number of log lines that contain a text."""
    return sum(part in line for line in service.log().splitlines())


def assert_database_unavailable(service: Service, reason: str, processes: int = 2) -> None:
    """Check that each call gets a 503 within a second, and that each process logs the reason in at most one line."""
    wait_until(lambda: service.answers("/healthz"))
    for _ in range(4):
        assert_problem(service.client.get("/readyz"), 503, "database_unavailable")
        assert_unavailable(create(service.client))
    assert service.answers("/healthz")
    assert_quick(service)
    assert lines_with(service, "cannot be reached yet: ") == 1  # by the master, before it starts workers
    assert 1 <= lines_with(service, reason) <= processes, service.log()
    assert [line for line in service.log().splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)] == []
    assert PASSWORD not in service.log()


# ---- the database is unavailable


@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_that_starts_without_its_database_needs_no_restart(
    postgres: Postgres, start: Start, figure: Figure, workers: int
) -> None:
    database = new_database(postgres, f"away{workers}")
    postgres.stop()
    service = start(DATABASE_URL=as_url(database), WEB_CONCURRENCY=workers)
    assert_database_unavailable(service, "No such file or directory", 1 + workers)

    postgres.start()
    returned = time.monotonic()
    with httpx.Client(base_url=service.url) as client:
        wait_until(lambda: create(client).status == httpx.codes.CREATED)
    delay = time.monotonic() - returned
    figure(f"first success after a start without the database, {workers} workers", f"{delay:.2f} s")
    wait_until(service.answers)
    assert applied_migrations(database) == APPLIED
    assert service.process.poll() is None


def test_a_wrong_password_is_logged_without_the_password_and_can_be_corrected_later(
    postgres: Postgres, start: Start
) -> None:
    database = new_database(postgres, "locked")
    query(database, "CREATE ROLE alice SUPERUSER LOGIN PASSWORD 'another'")
    query(database, "ALTER DATABASE locked OWNER TO alice")
    rules = postgres.cluster / "pg_hba.conf"
    rules.write_text(f"local locked alice scram-sha-256\n{rules.read_text()}")
    postgres.stop()
    postgres.start()
    with_password = as_url(make_conninfo(database, user="alice", password=PASSWORD))
    service = start(DATABASE_URL=with_password)
    assert_database_unavailable(service, 'password authentication failed for user "alice"')
    query(database, f"ALTER ROLE alice PASSWORD '{PASSWORD}'")
    wait_until(service.answers)
    assert PASSWORD not in service.log()


UNREACHABLE = {"unknown host": ("nowhere.invalid", "failed to resolve host"), "closed port": ("", "Connection refused")}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_an_unreachable_server_is_logged_and_each_request_gets_a_503(case: str, start: Start) -> None:
    host, reason = UNREACHABLE[case]
    service = start(DATABASE_URL=f"postgresql://todo:{PASSWORD}@{host or f'127.0.0.1:{free_port()}'}/todo")
    assert_database_unavailable(service, reason)


@pytest.mark.parametrize("backlog", [0, 128], ids=["ignores connections", "accepts connections and sends nothing"])
def test_an_unresponsive_server_delays_the_start_by_a_few_seconds_at_most(
    backlog: int, start: Start, figure: Figure
) -> None:
    with socket.socket() as listener, ExitStack() as opened:
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        for _ in range(3 if not backlog else 0):  # these fill the queue, so that the kernel ignores further connections
            stuck = opened.enter_context(closing(socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)))
            stuck.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        began = time.monotonic()
        service = start(DATABASE_URL=f"postgresql://todo:{PASSWORD}@127.0.0.1:{port}/todo", WEB_CONCURRENCY=2)
        wait_until(lambda: service.answers("/healthz"))
        delay = time.monotonic() - began
        figure(f"first response of /healthz with an unresponsive server, backlog {backlog}", f"{delay:.1f} s")
        assert delay < 30  # libpq waits at least 2 s
        assert_database_unavailable(service, "connection timeout expired", 3)


def test_a_service_can_start_before_the_embedded_postgresql_of_another_service(tmp_path: Path) -> None:
    data_dir = tmp_path.resolve() / "data"
    url = f"postgresql://todo@/todo?port=5432&host={quote(str(data_dir / 'postgres'), safe='')}"
    early = Service(tmp_path / "early", DATABASE_URL=url)
    wait_until(lambda: early.answers("/healthz"))
    assert_problem(early.client.get("/readyz"), 503, "database_unavailable")
    owner = Service(tmp_path / "owner", DATA_DIR=data_dir).wait()
    early.wait()
    assert early.client.get("/api/tasks").json() == []
    assert [early.stop(), owner.stop()] == [0, 0]


# ---- the database is newer than the code


def newer_database(postgres: Postgres, name: str, folder: Path) -> str:
    """Create a database with a migration that this code does not have."""
    database = new_database(postgres, name)
    copytree(statements.MIGRATIONS, folder)
    (folder / "9999.later.sql").write_text("CREATE TABLE later ();", encoding="utf-8")
    migrations.apply(database, folder)
    return database


def test_a_database_newer_than_the_code_stops_the_start_with_one_line(
    postgres: Postgres, tmp_path: Path, start: Start
) -> None:
    service = start(DATABASE_URL=as_url(newer_database(postgres, "newer", tmp_path / "newer")), WEB_CONCURRENCY=2)
    assert service.process.wait(timeout=120) == 3
    assert re.fullmatch("todo_api: the database is ahead of this code: .* 9999.later, .*\n", service.log())


def test_a_database_that_is_newer_and_unavailable_at_the_start_is_logged_later(
    postgres: Postgres, tmp_path: Path, start: Start
) -> None:
    database = newer_database(postgres, "newer_later", tmp_path / "newer")
    postgres.stop()
    service = start(DATABASE_URL=as_url(database))
    assert_database_unavailable(service, "No such file or directory")
    postgres.start()
    wait_until(lambda: not service.answers() and lines_with(service, "ahead of this code") > 0)
    assert_database_unavailable(service, "ahead of this code", 1)


# ---- concurrent starts and killed starts

POINTS = ["TABLE public._yoyo_migration", "DOMAIN public.new_task", "INDEX public.tasks_newest_first"]
POINTS += ["TABLE public.idempotency_keys"]


@pytest.mark.parametrize(
    ("point", "replicas"),
    [("TABLE public.tasks", 4), *(pytest.param(point, 2, marks=pytest.mark.long) for point in POINTS)],
)
def test_concurrent_starts_succeed_if_the_one_that_migrates_is_killed(
    postgres: Postgres, start: Start, point: str, replicas: int
) -> None:
    kind, name = point.split()
    database = new_database(postgres, "killed_" + name.removeprefix("public."))
    block_at(database, kind, name)
    with psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE gate")
        migrating = start(DATABASE_URL=as_url(database), WEB_CONCURRENCY=2)
        wait_until(lambda: waiting_locks(database) == 1)
        others = [start(DATABASE_URL=as_url(database)) for _ in range(replicas - 1)]
        wait_until(lambda: waiting_locks(database) == replicas)
        migrating.kill()
    for service in [*others, start(DATABASE_URL=as_url(database), WEB_CONCURRENCY=2)]:
        assert create(service.wait().client).status == httpx.codes.CREATED
    assert applied_migrations(database) == APPLIED


def block_at(database: str, kind: str, name: str) -> None:
    """Make each session that creates this object wait, right after that, until the table "gate" is not locked."""
    query(database, "CREATE TABLE gate ()")
    query(
        database,
        f"""CREATE FUNCTION wait_at_gate() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
        IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity = '{name}')
        THEN LOCK TABLE gate IN ACCESS SHARE MODE; END IF; END $$;
        CREATE EVENT TRIGGER at_gate ON ddl_command_end WHEN TAG IN ('CREATE {kind}')
        EXECUTE FUNCTION wait_at_gate()""",
    )


def waiting_locks(database: str) -> int:
    """Return the number of locks that connections wait for."""
    return len(query(database, "SELECT pid FROM pg_locks WHERE NOT granted"))
