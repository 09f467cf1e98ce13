"""The pool of connections to PostgreSQL: runs a statement of sql/ by its name and gives rows or ready-made JSON."""

import select
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import psycopg
from flask import Flask, current_app
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool

from todo_api import statements
from todo_api.config import StartError

Unavailable = psycopg.OperationalError
_EXTENSION = "todo_api.database"
_NOWHERE = "/nowhere"
_ATTEMPTS = 100  # at a statement that loses to others; of those at work at the same time, one wins each time


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
    connection = _live_connection(database.pool)
    try:
        row = _execute(connection, sql, parameters).fetchone()
    finally:
        database.pool.putconn(connection)
    return row[0] if row else None


def _live_connection(pool: ConnectionPool[psycopg.Connection[TupleRow]]) -> psycopg.Connection[TupleRow]:
    if pool.closed:
        pool.open()
    while True:
        connection = pool.getconn()
        # An idle connection with something to read is one that the server has ended. The pool's own check would ask the
        # server, which costs a round trip each time, and wait for seconds between one dead connection and the next.
        if not select.select([connection], [], [], 0)[0]:
            return connection
        connection.close()
        pool.putconn(connection)


def _execute(
    connection: psycopg.Connection[TupleRow], sql: bytes, parameters: dict[str, Any]
) -> psycopg.Cursor[TupleRow]:
    """Run a statement, and again where PostgreSQL gave it up in favour of another: it has done nothing then.

    PostgreSQL does so where a database's default isolation is stricter than READ COMMITTED, and to end a deadlock.
    """
    for _ in range(_ATTEMPTS):
        with suppress(psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
            return connection.execute(sql, parameters)
    return connection.execute(sql, parameters)


@cache
def check(url: str) -> None:
    """Refuse a DATABASE_URL that libpq does not understand.

    Raises:
        StartError: libpq's reason.

    """
    try:
        # libpq looks at some values only when it connects: so it is asked to, where nobody listens.
        hosts = str(conninfo_to_dict(url).get("host", "")).split(",")
        psycopg.connect(make_conninfo(url, host=",".join([_NOWHERE] * len(hosts)), hostaddr=""))
    except psycopg.Error as error:
        if _NOWHERE not in str(error):
            raise StartError(f"DATABASE_URL: {error}") from error


def libpq_variables(conninfo: str) -> tuple[dict[str, str], str]:
    """Spread a connection string over libpq's environment variables; what none takes is left over as a string.

    Other users of the machine can read a command's arguments, but not its environment.
    """
    names = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults() if option.envvar}
    parts = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    variables = {names[name].decode(): value for name, value in parts.items() if name in names}
    return variables, make_conninfo("", **{name: value for name, value in parts.items() if name not in names})
