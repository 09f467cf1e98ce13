"""The pool of connections to PostgreSQL: runs a statement of sql/ by its name and gives rows or ready-made JSON."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
from flask import Flask, current_app
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool

from todo_api import statements
from todo_api.config import StartError

Unavailable = psycopg.OperationalError
_EXTENSION = "todo_api.database"


class _JsonAsBytes(Loader):
    """Hands over JSON as the bytes that PostgreSQL sent; it goes to the client just so."""

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


@dataclass(frozen=True)
class _Database:
    pool: ConnectionPool[psycopg.Connection[TupleRow]]
    statements: dict[str, statements.Statement]


def init_app(app: Flask, conninfo: Callable[[], str], *, connections: int) -> None:
    """Give the application a pool; ``conninfo`` is called for each new connection, in a thread of the pool."""
    pool = ConnectionPool[psycopg.Connection[TupleRow]](
        conninfo,
        min_size=connections,
        max_size=connections,
        timeout=0.5,  # errors must reach the client within a second
        reconnect_timeout=0,  # no waiting longer and longer: the next request tries again
        configure=_configure,
        kwargs={
            "autocommit": True,  # each call is one statement
            "prepare_threshold": 0,  # the statements are few: each is planned once for a connection
            "application_name": "todo_api",
        },
        name="todo_api",
        open=False,  # threads and connections do not survive a fork: the worker opens it
    )
    app.extensions[_EXTENSION] = _Database(pool, statements.load())


def _configure(connection: psycopg.Connection[TupleRow]) -> None:
    connection.adapters.register_loader("json", _JsonAsBytes)


def fetch_json(name: str, **parameters: Any) -> bytes | None:
    """Run a statement and give its row as a JSON object, or None where it has no row.

    Raises:
        psycopg.Error: ``problems`` has the table of what becomes of which.

    """
    database: _Database = current_app.extensions[_EXTENSION]
    return _fetch_value(database, database.statements[name].row_json, parameters)


def fetch_json_list(name: str, **parameters: Any) -> bytes:
    """Run a statement and give its rows as a JSON array.

    Raises:
        psycopg.Error: ``problems`` has the table of what becomes of which.

    """
    database: _Database = current_app.extensions[_EXTENSION]
    return _fetch_value(database, database.statements[name].rows_json, parameters) or b"[]"


def _fetch_value(database: _Database, sql: bytes, parameters: dict[str, Any]) -> bytes | None:
    if database.pool.closed:
        database.pool.open()
    with database.pool.connection() as connection:
        row = connection.execute(sql, parameters).fetchone()
    return row[0] if row else None


def check(url: str) -> None:
    """Refuse a DATABASE_URL that libpq would not understand.

    Raises:
        StartError: libpq's reason.

    """
    try:
        conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        raise StartError(f"DATABASE_URL: {error}") from error


def split_password(conninfo: str) -> tuple[str, str | None]:
    """Take the password out of a connection string, which other users of the machine can read in ``ps``."""
    parts = conninfo_to_dict(conninfo)
    password = parts.pop("password", None)
    return make_conninfo("", **parts), str(password) if password else None
