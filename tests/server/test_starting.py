"""A start without its database, with one that it can't use, beside other starts, and killed at any point."""

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
from todo_api import migrations, statements

PASSWORD = "h-u-s-h"
APPLIED = sorted(path.stem for path in statements.MIGRATIONS.glob("[0-9]*[!k].sql"))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL in which each test makes a database of its own; which it may stop."""
    running = Postgres(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


def query(conninfo: str, sql: str) -> list[str]:
    """Run a statement of the test's own and give its rows' first values."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return [str(row[0]) for row in cursor] if cursor.description else []


def new_database(postgres: Postgres, name: str) -> str:
    """Make an empty database and give its connection string."""
    if not postgres.answers():
        postgres.start()  # a test that failed has left it so
    query(postgres.conninfo, f"CREATE DATABASE {name}")
    return make_conninfo(postgres.conninfo, dbname=name)


def marks(conninfo: str) -> list[str]:
    """Give the migrations that are marked as applied, each as often as yoyo's log has it."""
    joined = "SELECT migration_id FROM _yoyo_migration JOIN _yoyo_log USING (migration_id) ORDER BY 1"
    return query(conninfo, joined)


def said(service: Service, part: str) -> int:
    """Count the lines of the log that hold something."""
    return sum(part in line for line in service.log().splitlines())


def assert_away(service: Service, reason: str, processes: int = 2) -> None:
    """Check that each call gets its 503 within a second, and that each process says why once, in one line, or never."""
    wait_until(lambda: service.answers("/healthz"))
    for _ in range(4):
        assert_problem(service.client.get("/readyz"), 503, "database_unavailable")
        assert_unavailable(create(service.client))
    assert service.answers("/healthz")
    assert_quick(service)
    assert said(service, "can't be reached yet: ") == 1  # by the master, before it has workers
    assert 1 <= said(service, reason) <= processes, service.log()
    assert [line for line in service.log().splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)] == []
    assert PASSWORD not in service.log()


# ---- the database is away


@pytest.mark.parametrize("workers", [1, 2])
def test_a_start_before_the_database_answers_503_and_then_works_without_a_restart(
    postgres: Postgres, start: Start, figure: Figure, workers: int
) -> None:
    database = new_database(postgres, f"away{workers}")
    postgres.stop()
    service = start(DATABASE_URL=as_url(database), WEB_CONCURRENCY=workers)
    assert_away(service, "No such file or directory", 1 + workers)

    postgres.start()
    returned = time.monotonic()
    with httpx.Client(base_url=service.url) as client:
        wait_until(lambda: create(client).status == httpx.codes.CREATED)
    healed = time.monotonic() - returned
    figure(f"served again, after a start without the database, {workers} workers", f"{healed:.2f} s")
    wait_until(service.answers)
    assert marks(database) == APPLIED
    assert service.process.poll() is None


def test_a_wrong_password_is_said_without_it_and_heals_when_it_is_set_right(postgres: Postgres, start: Start) -> None:
    database = new_database(postgres, "locked")
    query(database, "CREATE ROLE alice LOGIN PASSWORD 'another'")
    query(database, "ALTER DATABASE locked OWNER TO alice")
    rules = postgres.cluster / "pg_hba.conf"
    rules.write_text(f"local locked alice scram-sha-256\n{rules.read_text()}")
    postgres.stop()
    postgres.start()
    with_password = as_url(make_conninfo(database, user="alice", password=PASSWORD))
    service = start(DATABASE_URL=with_password)
    assert_away(service, 'password authentication failed for user "alice"')
    query(database, f"ALTER ROLE alice PASSWORD '{PASSWORD}'")
    wait_until(service.answers)
    assert PASSWORD not in service.log()


NOWHERE = {"unknown host": ("nowhere.invalid", "failed to resolve host"), "closed port": ("", "Connection refused")}


@pytest.mark.parametrize("case", NOWHERE)
def test_a_server_that_is_nowhere_gets_a_line_and_503s(case: str, start: Start) -> None:
    host, reason = NOWHERE[case]
    service = start(DATABASE_URL=f"postgresql://todo:{PASSWORD}@{host or f'127.0.0.1:{free_port()}'}/todo")
    assert_away(service, reason)


@pytest.mark.parametrize("backlog", [0, 128], ids=["drops each connection", "takes connections and says nothing"])
def test_a_server_that_never_answers_delays_the_start_by_seconds_only(
    backlog: int, start: Start, figure: Figure
) -> None:
    with socket.socket() as listener, ExitStack() as opened:
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        for _ in range(3 if not backlog else 0):  # the kernel ignores whoever comes after these
            stuck = opened.enter_context(closing(socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)))
            stuck.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        began = time.monotonic()
        service = start(DATABASE_URL=f"postgresql://todo:{PASSWORD}@127.0.0.1:{port}/todo", WEB_CONCURRENCY=2)
        wait_until(lambda: service.answers("/healthz"))
        delay = time.monotonic() - began
        figure(f"/healthz answers, beside a server that does not, backlog {backlog}", f"{delay:.1f} s")
        assert delay < 30  # libpq waits 2 s at least
        assert_away(service, "connection timeout expired", 3)


def test_a_service_that_starts_before_its_database_goes_on_by_itself(tmp_path: Path) -> None:
    data_dir = tmp_path.resolve() / "data"
    url = f"postgresql://todo@/todo?port=5432&host={quote(str(data_dir / 'postgres'), safe='')}"
    early = Service(tmp_path / "early", DATABASE_URL=url)
    wait_until(lambda: early.answers("/healthz"))
    assert_problem(early.client.get("/readyz"), 503, "database_unavailable")
    owner = Service(tmp_path / "owner", DATA_DIR=data_dir).wait()
    early.wait()
    assert early.client.get("/api/tasks").json() == []
    assert [early.stop(), owner.stop()] == [0, 0]


# ---- the database is of another age


def newer(postgres: Postgres, name: str, folder: Path) -> str:
    """Make a database that has a migration which this code lacks."""
    database = new_database(postgres, name)
    copytree(statements.MIGRATIONS, folder)
    (folder / "9999.later.sql").write_text("CREATE TABLE later ();", encoding="utf-8")
    migrations.apply(database, folder)
    return database


def test_a_database_newer_than_the_code_ends_the_start_with_one_line(
    postgres: Postgres, tmp_path: Path, start: Start
) -> None:
    service = start(DATABASE_URL=as_url(newer(postgres, "newer", tmp_path / "newer")), WEB_CONCURRENCY=2)
    assert service.process.wait(timeout=30) == 3
    assert re.fullmatch("todo_api: the database is ahead of this code: .* 9999.later, .*\n", service.log())


def test_a_database_that_proves_newer_once_it_is_back_is_named_in_the_log(
    postgres: Postgres, tmp_path: Path, start: Start
) -> None:
    database = newer(postgres, "newer_later", tmp_path / "newer")
    postgres.stop()
    service = start(DATABASE_URL=as_url(database))
    assert_away(service, "No such file or directory")
    postgres.start()
    wait_until(lambda: not service.answers() and said(service, "ahead of this code") > 0)
    assert_away(service, "ahead of this code", 1)


# ---- several starts, and starts that are killed

POINTS = ["TABLE public._yoyo_migration", "DOMAIN public.new_task", "INDEX public.tasks_newest_first"]
POINTS += ["TABLE public.idempotency_keys"]


@pytest.mark.parametrize(
    ("point", "replicas"),
    [("TABLE public.tasks", 4), *(pytest.param(point, 2, marks=pytest.mark.long) for point in POINTS)],
)
def test_starts_at_once_get_ready_though_the_one_that_migrates_is_killed(
    postgres: Postgres, start: Start, point: str, replicas: int
) -> None:
    kind, name = point.split()
    database = new_database(postgres, "killed_" + name.removeprefix("public."))
    stop_at(database, kind, name)
    with psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE gate")
        at_work = start(DATABASE_URL=as_url(database), WEB_CONCURRENCY=2)
        wait_until(lambda: waiting(database) == 1)
        others = [start(DATABASE_URL=as_url(database)) for _ in range(replicas - 1)]
        wait_until(lambda: waiting(database) == replicas)
        at_work.kill()
    for service in [*others, start(DATABASE_URL=as_url(database), WEB_CONCURRENCY=2)]:
        assert create(service.wait().client).status == httpx.codes.CREATED
    assert marks(database) == APPLIED


def stop_at(database: str, kind: str, name: str) -> None:
    """Have whoever creates something wait at the end of that until the table "gate" is free."""
    query(database, "CREATE TABLE gate ()")
    query(
        database,
        f"""CREATE FUNCTION wait_at_gate() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
        IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity = '{name}')
        THEN LOCK TABLE gate IN ACCESS SHARE MODE; END IF; END $$;
        CREATE EVENT TRIGGER at_gate ON ddl_command_end WHEN TAG IN ('CREATE {kind}')
        EXECUTE FUNCTION wait_at_gate()""",
    )


def waiting(database: str) -> int:
    """Count the connections that wait for a lock."""
    return len(query(database, "SELECT pid FROM pg_locks WHERE NOT granted"))
