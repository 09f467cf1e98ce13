"""The idempotency keys of users who do not come back are cleared in the background, and no request pays for it."""

import re
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from tests.support.databases import administrator, as_url, migrate, new_database
from tests.support.fixtures import Start
from tests.support.processes import wait_until
from tests.support.service import Service
from todo_api.database import statements

ABANDONED = """
    INSERT INTO idempotency_keys (user_id, key, task, task_id, created_at)
    SELECT 'user ' || n %% %s, 'key ' || n, '{"title": "a"}', n, now() - %s::interval FROM generate_series(1, %s) AS n
"""


@pytest.fixture
def database(conninfo: str) -> Iterator[str]:
    """Return the connection string of a database with the project's tables, and with the role."""
    with new_database(conninfo) as database:
        migrate(database)
        yield database


@pytest.fixture
def owner(database: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return a connection to it as the tables' owner."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def create_once(service: Service, key: str) -> None:
    """Create a task with an idempotency key."""
    response = service.client.post("/api/tasks", json={"title": "a"}, headers={"Idempotency-Key": key})
    assert response.status_code == 201, response.text


def key_count(owner: psycopg.Connection[TupleRow]) -> int:
    """Return the number of keys of all users."""
    row = owner.execute("SELECT count(*) FROM idempotency_keys").fetchone()
    assert row
    return int(row[0])


def test_a_create_with_a_key_has_a_worker_clear_the_old_keys_of_all_users(
    database: str, owner: psycopg.Connection[TupleRow], start: Start
) -> None:
    service = start(DATABASE_URL=as_url(database)).wait()
    owner.execute(ABANDONED, [7, "49 hours", 70])
    owner.execute(ABANDONED.replace("'key '", "'newer '"), [7, "47 hours", 70])
    service.client.post("/api/tasks", json={"title": "a"}).raise_for_status()
    assert key_count(owner) == 140
    create_once(service, "mine")
    wait_until(lambda: key_count(owner) == 71)
    assert owner.execute("SELECT DISTINCT left(key, 5) FROM idempotency_keys ORDER BY 1").fetchall() == [
        ("mine",),
        ("newer",),
    ]
    # Not again in the next hour.
    owner.execute(ABANDONED, [7, "49 hours", 70])
    create_once(service, "mine too")
    assert key_count(owner) == 142
    assert service.stop() == 0


def test_a_run_clears_at_most_1000_keys_of_each_of_1000_users(
    database: str, owner: psycopg.Connection[TupleRow]
) -> None:
    owner.execute(ABANDONED, [3, "49 hours", 4500])
    loaded = statements.load()
    users = owner.execute(loaded["database/abandoned_keys"].rows).fetchall()
    assert len(users) == 1000
    psycopg.RawCursor(owner).execute(loaded["database/clear_abandoned_keys"].rows, ["user 1"])
    assert key_count(owner) == 3500


@pytest.fixture
def login(database: str) -> Iterator[str]:
    """Return the connection string of a role that may work as todo_app, and owns nothing."""
    parts = {"user": f"login_{conninfo_to_dict(database)['dbname']}", "password": "secret"}
    role = sql.Identifier(parts["user"])
    with psycopg.connect(administrator(database), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {0} LOGIN PASSWORD 'secret' NOINHERIT; GRANT todo_app TO {0}").format(role))
        admin.execute(sql.SQL("GRANT SELECT ON _yoyo_log, _yoyo_migration, _yoyo_version TO {}").format(role))
        yield make_conninfo(database, **parts)
        admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_the_tables_owner_clears_them_if_the_service_logs_in_as_another_role(
    database: str, login: str, owner: psycopg.Connection[TupleRow], start: Start
) -> None:
    owner.execute(ABANDONED, [7, "49 hours", 70])
    service = start(DATABASE_URL=as_url(login), MIGRATION_DATABASE_URL=as_url(database)).wait()
    create_once(service, "mine")
    wait_until(lambda: key_count(owner) == 1)
    assert service.stop() == 0


def test_a_log_line_names_the_setting_that_is_missing_if_row_level_security_hides_the_keys(
    login: str, owner: psycopg.Connection[TupleRow], start: Start
) -> None:
    owner.execute(ABANDONED, [7, "49 hours", 70])
    service = start(DATABASE_URL=as_url(login)).wait()  # somebody else has applied the migrations
    create_once(service, "mine")
    wait_until(lambda: "old idempotency keys are not cleared: row-level security hides them" in service.log())
    assert "set MIGRATION_DATABASE_URL" in service.log()
    assert key_count(owner) == 71
    assert service.stop() == 0


def test_a_failure_is_logged_and_no_request_fails(
    database: str, owner: psycopg.Connection[TupleRow], start: Start
) -> None:
    owner.execute(ABANDONED, [7, "49 hours", 70])
    owner.execute(FAIL_TO_CLEAR)
    service = start(DATABASE_URL=as_url(database)).wait()
    for number in range(3):
        create_once(service, f"key {number}")
    wait_until(lambda: "are not cleared" in service.log())
    create_once(service, "last key")
    assert len(re.findall("WARNING.* old idempotency keys are not cleared: not now$", service.log(), re.MULTILINE)) == 1
    assert "Traceback" not in service.log()
    assert key_count(owner) == 74
    assert service.stop() == 0


FAIL_TO_CLEAR = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''not now''; END';
    CREATE TRIGGER fail BEFORE DELETE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION fail()
"""
