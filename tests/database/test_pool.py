"""The pool: it lends only connections that work, and gets each one back."""

from concurrent.futures import ThreadPoolExecutor

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.support.databases import new_database
from todo_api.database import Database, apply_migrations


def migrated_database(conninfo: str, connections: int = 1) -> Database:
    """Apply the migrations and return the database."""
    apply_migrations(conninfo)
    return Database(lambda: conninfo, connections=connections, pooler=False)


def test_an_idle_connection_that_cannot_be_examined_is_replaced(conninfo: str) -> None:
    database = migrated_database(conninfo)
    for _ in range(3):
        with database.pool.connection() as connection:
            pass
        connection.close()
        assert database.fetch_json("database/ready")


def test_statements_are_retried_after_a_serialization_failure(conninfo: str) -> None:
    with new_database(conninfo) as strict:
        name = conninfo_to_dict(strict)["dbname"]
        with psycopg.connect(strict, autocommit=True) as db:
            db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'".encode())
        database = migrated_database(strict, connections=8)
        database.fetch_json("tasks/create", user_id="local", task='{"title": "Buy milk"}')
        with ThreadPoolExecutor(8) as threads:
            toggles = [
                threads.submit(database.fetch_json, "tasks/toggle", user_id="local", task_id=1, if_match="{}")
                for _ in range(200)
            ]
        assert all(toggle.result() for toggle in toggles)
        with psycopg.connect(strict) as db:
            assert db.execute("SELECT version FROM tasks").fetchall() == [(201,)]
