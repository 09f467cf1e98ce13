"""The service notices Citus at its start. sql/citus/distribute.sql is for psql only.

Citus is in no package registry. So these tests make a database look as if it had Citus: an entry in pg_extension, and
a table instead of Citus's catalog pg_dist_partition.
"""

import re
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.commands import flask
from tests.support.databases import TABLES, administrator, as_url, migrate, new_database
from tests.support.environment import POOLER, ROOT
from tests.support.fixtures import Start
from tests.support.psql import run_psql
from todo_api.database import suited_to_citus
from todo_api.database.connection import Connection, Query

DISTRIBUTE = "sql/citus/distribute.sql"
INSTALL = """
    INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
    SELECT 16383, 'citus', 10, 'pg_catalog'::regnamespace, FALSE, '13.2-1';
    CREATE TABLE pg_dist_partition (logicalrelid regclass);
    GRANT SELECT ON pg_dist_partition TO PUBLIC
"""
SHARE_OUT = "INSERT INTO pg_dist_partition VALUES ('tasks'), ('idempotency_keys')"
PLANS: Query = (b"SELECT current_setting('plan_cache_mode')", [])


@pytest.fixture
def database(conninfo: str) -> Iterator[str]:
    """Return the connection string of a database with the project's tables."""
    with new_database(conninfo) as database:
        migrate(database)
        yield database


@pytest.fixture
def admin(database: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return a connection to it as a superuser."""
    with psycopg.connect(administrator(database), autocommit=True) as connection:
        yield connection


def plan_mode(conninfo: str) -> str:
    """Return how the sessions of the service make plans."""
    with Connection.connect(suited_to_citus(conninfo, role="", pooler=False), **Connection.arguments) as connection:
        [mode] = connection.fetch(PLANS) or ()
    return mode.decode()


def test_only_with_citus_sessions_use_no_generic_plans(database: str, admin: psycopg.Connection[TupleRow]) -> None:
    assert plan_mode(database) == "force_generic_plan"
    admin.execute(INSTALL)
    assert plan_mode(database) == "auto"


def test_the_sessions_of_a_service_that_finds_citus_use_no_generic_plans(
    database: str, admin: psycopg.Connection[TupleRow], start: Start
) -> None:
    for commands, mode in ((RECORD_PLANS, "force_generic_plan"), (INSTALL, "auto")):
        admin.execute(commands)
        service = start(DATABASE_URL=as_url(database)).wait()
        service.client.post("/api/tasks", json={"title": "a"}).raise_for_status()
        assert service.stop() == 0
        # Behind a pooler, the service sets nothing, because it prepares nothing.
        assert admin.execute("SELECT DISTINCT mode FROM plans").fetchall() == [("auto" if POOLER else mode,)]
        admin.execute("DELETE FROM plans")


RECORD_PLANS = """
    CREATE TABLE plans (mode text);
    GRANT INSERT ON plans TO PUBLIC;
    CREATE FUNCTION record_plans() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO plans VALUES (current_setting(''plan_cache_mode'')); RETURN NEW; END';
    CREATE TRIGGER record_plans BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION record_plans()
"""


def test_options_of_the_url_and_the_environment_still_count(
    database: str, admin: psycopg.Connection[TupleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    admin.execute(INSTALL)
    work_mem: Query = (b"SELECT current_setting('work_mem'), current_setting('todo.session')", [])
    with_options = f"{database} options='-c work_mem=5MB'"
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=6MB")
    for conninfo, expected in ((with_options, b"5MB"), (database, b"6MB")):
        with Connection.connect(suited_to_citus(conninfo, role="", pooler=False), **Connection.arguments) as connection:
            assert connection.fetch(work_mem) == (expected, b"on")
            assert connection.fetch(PLANS) == (b"auto",)


def test_a_start_with_shared_out_tables_and_a_role_ends_with_one_line(
    database: str, admin: psycopg.Connection[TupleRow], start: Start
) -> None:
    admin.execute(INSTALL)
    service = start(DATABASE_URL=as_url(database)).wait()  # the tables are not shared out yet
    assert service.stop() == 0
    admin.execute(SHARE_OUT)
    refused = start(DATABASE_URL=as_url(database))
    assert refused.process.wait(timeout=60) == 3
    assert re.fullmatch(
        "todo_api: the tables are shared out with Citus, .* role todo_app: set DATABASE_ROLE to nothing, .*",
        refused.log().splitlines()[-1],
    )
    assert "Traceback" not in refused.log()
    checked = flask("check", DATABASE_URL=as_url(database))
    assert "\nFAIL role: the tables are shared out with Citus, " in checked.stdout
    service = start(DATABASE_URL=as_url(database), DATABASE_ROLE="").wait()
    task = service.client.post("/api/tasks", json={"title": "a"}).json()
    assert service.client.get("/api/tasks").json() == [task]
    assert service.stop() == 0


def test_without_citus_the_file_for_psql_fails_and_changes_nothing(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as owner:
        before = owner.execute("SELECT oid, relname FROM pg_class ORDER BY oid").fetchall()
        done = run_psql(database, DISTRIBUTE, {}, arguments=("-1",))
        assert done.returncode == 3
        assert "function create_distributed_table(unknown, unknown) does not exist" in done.stderr
        assert owner.execute("SELECT oid, relname FROM pg_class ORDER BY oid").fetchall() == before


def test_the_file_for_psql_shares_out_both_tables_by_user_and_changes_nothing_else(database: str) -> None:
    text = (ROOT / DISTRIBUTE).read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line and not line.startswith("--")]
    assert all(re.fullmatch(r"SELECT create_distributed_table\('\w+', 'user_id'.*\);", line) for line in commands)
    with psycopg.connect(database, autocommit=True) as owner:
        owner.execute(RECORD)
        done = run_psql(database, DISTRIBUTE, {}, arguments=("-1",))
        assert (done.returncode, done.stderr) == (0, "")
        recorded = owner.execute("SELECT name, place, beside FROM recorded").fetchall()
        assert recorded == [("tasks", "user_id", "default"), ("idempotency_keys", "user_id", "tasks")]
        assert {name for name, *_ in recorded} == set(TABLES)


RECORD = """
    CREATE TABLE recorded (name regclass, place text, beside text);
    CREATE FUNCTION create_distributed_table(name regclass, place text, colocate_with text DEFAULT 'default')
    RETURNS void BEGIN ATOMIC INSERT INTO recorded VALUES (name, place, colocate_with); END
"""
