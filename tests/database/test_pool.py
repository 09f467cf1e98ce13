"""The pool hands out connections that work, and gets each of them back."""

import gc
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from tests.support.databases import new_database
from tests.support.processes import free_port, wait_until
from todo_api.database import Database, InvalidValueError, UnavailableError, apply_migrations, ensure_role
from todo_api.database.connection import Connection


def database(conninfo: str) -> Database:
    """Return a database with the project's tables."""
    apply_migrations(conninfo)
    ensure_role(conninfo, "todo_app", pooler=False, owner=conninfo)
    return Database(lambda: conninfo, pooler=False, role="todo_app")


def test_an_idle_connection_that_cannot_be_checked_is_replaced(conninfo: str) -> None:
    ours = database(conninfo)
    for _ in range(3):
        assert ours.fetch_json("database/ready")
        for connection in [found for found in gc.get_objects() if isinstance(found, Connection)]:
            connection.close()  # the pool does not notice
        assert ours.fetch_json("database/ready")


def test_statements_that_fail_during_an_outage_are_forgotten_and_the_outage_still_ends(conninfo: str) -> None:
    conninfos = [f"host=127.0.0.1 port={free_port()}"]
    ours = Database(lambda: conninfos[-1], pooler=False, role="")
    for _ in range(150):
        with pytest.raises(UnavailableError):
            ours.fetch_json("database/ready")
    [pool] = [value for value in vars(ours.pool).values() if isinstance(value, ConnectionPool)]
    assert pool.get_stats()["requests_waiting"] <= 100
    apply_migrations(conninfo)
    conninfos.append(conninfo)
    wait_until(lambda: succeeds(ours))


def succeeds(database: Database) -> bool:
    """Return whether the database can be reached."""
    try:
        return bool(database.fetch_json("database/ready"))
    except UnavailableError:
        return False


def test_a_statement_that_postgresql_rolled_back_for_another_one_is_retried(conninfo: str) -> None:
    with new_database(conninfo) as strict:
        name = conninfo_to_dict(strict)["dbname"]
        with psycopg.connect(strict, autocommit=True) as db:
            db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'".encode())
        ours = database(strict)
        ours.fetch_json("tasks/create", user_id="local", task='{"title": "Buy milk"}')
        with ThreadPoolExecutor(8) as threads:
            toggles = [
                threads.submit(ours.fetch_json, "tasks/toggle", user_id="local", task_id=1, if_match="{}")
                for _ in range(80)
            ]
        assert all(toggle.result() for toggle in toggles)
        with psycopg.connect(strict) as db:
            assert db.execute("SELECT version FROM tasks").fetchall() == [(81,)]


@pytest.mark.parametrize(
    ("state", "error"), [("57P99", UnavailableError), ("53ABC", UnavailableError), ("22XYZ", InvalidValueError)]
)
def test_an_unknown_sqlstate_counts_by_its_class(conninfo: str, state: str, error: type[Exception]) -> None:
    with new_database(conninfo) as database:
        ours = Database(lambda: database, pooler=False, role="")
        apply_migrations(database)
        with psycopg.connect(database, autocommit=True) as db:
            db.execute(
                f"""
                CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION USING ERRCODE = '{state}'; END $$;
                CREATE TRIGGER fail BEFORE INSERT ON tasks EXECUTE FUNCTION fail()
                """.encode()
            )
        with pytest.raises(error):
            ours.fetch_json("tasks/create", user_id="local", task='{"title": "Buy milk"}')
