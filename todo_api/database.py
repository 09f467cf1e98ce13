"""The pool of connections to PostgreSQL: runs a statement of sql/ by its name and gives rows or ready-made JSON."""

import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
from flask import Flask, current_app
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout

from todo_api import database_url, statements
from todo_api.config import StartError
from todo_api.connection import OPTIONS, STATEMENT_TIMEOUT, Connection, PoolerConnection, Silence
from todo_api.outage import Outage

Unavailable = psycopg.OperationalError
_EXTENSION = "todo_api.database"
_LOOK = 0.01  # seconds to wait for a connection before a look at whether there can be one
_LOOKS = 50  # errors must reach the client within a second
_START_PATIENCE = 2  # seconds for a new worker to connect; those before it still serve
_ATTEMPTS = 100  # at a statement that loses to others; of those at work at the same time, one wins each time


@dataclass(frozen=True)
class _Database:
    pool: ConnectionPool[Connection]
    statements: dict[str, statements.Statement]
    outage: Outage


def init_app(app: Flask, conninfo: Callable[[], str], *, connections: int, pooler: bool) -> None:
    """Give the application a pool.

    ``conninfo`` is called for each new connection, in a thread of the pool. ``pooler`` says that a pooler in
    transaction mode is in between.
    """
    kind = PoolerConnection if pooler else Connection
    outage = Outage()
    loaded = statements.load()

    def configure(connection: Connection) -> None:
        connection.configure()
        if pooler:  # it lets clients in, and lets them wait, while PostgreSQL is away
            connection.execute(loaded["database/session"].rows)
        outage.end()

    def failed(pool: ConnectionPool[Connection]) -> None:
        if not pool.get_stats()["pool_size"]:  # while it has some, it is worth waiting for one
            outage.begin()

    pool = ConnectionPool(
        conninfo if pooler else lambda: database_url.with_options(conninfo(), OPTIONS),
        connection_class=kind,
        kwargs=kind.arguments,
        min_size=connections,
        max_size=connections,
        reconnect_timeout=0,  # no waiting longer and longer: the next request tries again
        reconnect_failed=failed,
        configure=configure,
        name="todo_api",
        open=False,  # threads and connections do not survive a fork: the worker opens it
    )
    app.extensions[_EXTENSION] = _Database(pool, loaded, outage)


def connect(app: Flask) -> None:
    """Fill the pool, unless the database is away: the first requests would wait while it fills, and some give up."""
    database: _Database = app.extensions[_EXTENSION]
    pool = database.pool
    pool.open()
    deadline = time.monotonic() + _START_PATIENCE
    while pool.get_stats()["pool_available"] < pool.min_size:
        if database.outage.known or time.monotonic() > deadline:
            return
        time.sleep(0.01)


def check_session(conninfo: str) -> None:
    """Find out whether a session has the settings it asked for: behind a pooler in transaction mode it has not.

    Nor has it then what it prepared, or, which is worse, it has what another process prepared under the same name.

    Raises:
        StartError: it has not, with what to do.
        Unavailable: the database can't be reached.

    """
    try:
        with Connection.connect(database_url.with_options(conninfo, OPTIONS), **Connection.arguments) as connection:
            (limit,) = connection.execute(statements.load()["database/session"].rows).fetchone() or (None,)
    except Unavailable as error:
        if "unsupported startup parameter" not in str(error):
            raise
        limit = None
    if limit != STATEMENT_TIMEOUT:
        raise StartError("DATABASE_URL leads to a pooler that takes no session settings: set DATABASE_POOLER=true")


def fetch_json(name: str, **parameters: Any) -> bytes | None:
    """Run a statement and give its row as a JSON object, or None where it has no row.

    Raises:
        psycopg.Error: ``problems`` has the table of what becomes of which.

    """
    database: _Database = current_app.extensions[_EXTENSION]
    row = _fetch_row(database, database.statements[name].row_json, parameters, is_small=True)
    return row[0] if row else None


def fetch_json_list(name: str, **parameters: Any) -> tuple[bytes, int]:
    """Run a statement and give its rows as a JSON array, and how many there are.

    Raises:
        psycopg.Error: ``problems`` has the table of what becomes of which.

    """
    database: _Database = current_app.extensions[_EXTENSION]
    return _fetch_row(database, database.statements[name].rows_json, parameters, is_small=False) or (b"[]", 0)


def _fetch_row(database: _Database, sql: bytes, parameters: dict[str, Any], *, is_small: bool) -> Any:
    connection = _live_connection(database)
    try:
        cursor = connection.kept_cursor if is_small else connection.cursor()
        return _execute(cursor, sql, parameters).fetchone()
    except Silence:
        connection.abandon()
        database.pool.drain()  # nobody else should find out by waiting
        raise
    except psycopg.errors.ReadOnlySqlTransaction:
        # It was the primary's when it was made: target_session_attrs is looked at then, and never again.
        database.pool.drain()
        raise
    finally:
        database.pool.putconn(connection)


def _live_connection(database: _Database) -> Connection:
    pool, outage = database.pool, database.outage
    if pool.closed:
        pool.open()
    while True:
        connection = _checked_out(pool, outage)
        if not _ended(connection):
            outage.end()
            return connection
        connection.close()
        pool.putconn(connection)


def _checked_out(pool: ConnectionPool[Connection], outage: Outage) -> Connection:
    """Take a connection out of the pool.

    Nobody waits for a database that is known to be away: others would queue behind those that do. But asking makes the
    pool try to connect, and who comes after its success is served.
    """
    for _ in range(_LOOKS):
        try:
            return pool.getconn(timeout=_LOOK)
        except PoolTimeout:
            if outage.known:
                break
    outage.begin()
    raise Unavailable("no connection to the database")


def _ended(connection: Connection) -> bool:
    """Say whether the server has ended an idle connection: then there is something to read.

    The pool's own check would ask the server, which costs a round trip each time, and wait for seconds between one dead
    connection and the next.
    """
    readable = select.poll()  # not select.select, which knows only the first 1024 file descriptors
    readable.register(connection, select.POLLIN)
    return bool(readable.poll(0))


def _execute(cursor: psycopg.Cursor[TupleRow], sql: bytes, parameters: dict[str, Any]) -> psycopg.Cursor[TupleRow]:
    """Run a statement, and again where PostgreSQL gave it up in favour of another: it has done nothing then.

    PostgreSQL does so where a database's default isolation is stricter than READ COMMITTED, and to end a deadlock.
    """
    for _ in range(_ATTEMPTS):
        try:
            return cursor.execute(sql, parameters)
        except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
            continue
    return cursor.execute(sql, parameters)
