"""The pool of connections to PostgreSQL: runs a statement of sql/ by its name and gives rows or ready-made JSON."""

import logging
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from flask import Flask, current_app
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout

from todo_api import database_url, statements
from todo_api.connection import OPTIONS, Connection, PoolerConnection, Silence, take_json_as_bytes

Unavailable = psycopg.OperationalError
_EXTENSION = "todo_api.database"
_LOOK = 0.01  # seconds to wait for a connection before a look at whether there can be one
_LOOKS = 50  # errors must reach the client within a second
_ATTEMPTS = 100  # at a statement that loses to others; of those at work at the same time, one wins each time

log = logging.getLogger(__name__)


class _Outage(logging.Filter):
    """Whether the database is known to be away, and a line in the log when that changes.

    The pool logs some lines for each attempt to connect. Out of these it takes the reason, and drops them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known = False
        self._reason = "it does not answer"
        self._lock = threading.Lock()
        logging.getLogger("psycopg.pool").addFilter(self)

    def __bool__(self) -> bool:
        return self._known

    def filter(self, record: logging.LogRecord) -> bool:
        for argument in record.args or ():
            if isinstance(argument, Exception):
                self._reason = str(argument).partition("\n")[0]
        return False

    def begin(self) -> None:
        with self._lock:
            if not self._known:
                log.warning("requests get a 503 until the database can be reached: %s", self._reason)
                self._known = True

    def end(self) -> None:
        if not self._known:  # as on each request
            return
        with self._lock:
            if self._known:
                log.warning("the database can be reached again")
                self._known = False


@dataclass(frozen=True)
class _Database:
    pool: ConnectionPool[Connection]
    statements: dict[str, statements.Statement]
    outage: _Outage


def init_app(app: Flask, conninfo: Callable[[], str], *, connections: int, pooler: bool) -> None:
    """Give the application a pool.

    ``conninfo`` is called for each new connection, in a thread of the pool. ``pooler`` says that a pooler in
    transaction mode is in between.
    """
    kind = PoolerConnection if pooler else Connection
    outage = _Outage()

    def configure(connection: Connection) -> None:
        take_json_as_bytes(connection)
        outage.end()

    pool = ConnectionPool(
        conninfo if pooler else lambda: database_url.with_options(conninfo(), OPTIONS),
        connection_class=kind,
        kwargs=kind.arguments,
        min_size=connections,
        max_size=connections,
        reconnect_timeout=0,  # no waiting longer and longer: the next request tries again
        reconnect_failed=lambda _: outage.begin(),
        configure=configure,
        name="todo_api",
        open=False,  # threads and connections do not survive a fork: the worker opens it
    )
    app.extensions[_EXTENSION] = _Database(pool, statements.load(), outage)


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
    connection = _live_connection(database)
    try:
        row = _execute(connection, sql, parameters).fetchone()
    except Silence:
        connection.abandon()
        database.pool.drain()  # nobody else should find out by waiting
        raise
    finally:
        database.pool.putconn(connection)
    return row[0] if row else None


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


def _checked_out(pool: ConnectionPool[Connection], outage: _Outage) -> Connection:
    """Take a connection out of the pool.

    Nobody waits for a database that is known to be away: others would queue behind those that do. But asking makes the
    pool try to connect, and who comes after its success is served.
    """
    for _ in range(_LOOKS):
        with suppress(PoolTimeout):
            return pool.getconn(timeout=_LOOK)
        if outage:
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


def _execute(connection: Connection, sql: bytes, parameters: dict[str, Any]) -> psycopg.Cursor[TupleRow]:
    """Run a statement, and again where PostgreSQL gave it up in favour of another: it has done nothing then.

    PostgreSQL does so where a database's default isolation is stricter than READ COMMITTED, and to end a deadlock.
    """
    for _ in range(_ATTEMPTS):
        with suppress(psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
            return connection.execute(sql, parameters)
    return connection.execute(sql, parameters)
