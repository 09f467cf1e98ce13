"""The pool of connections to PostgreSQL: runs a statement of sql/ by its name and gives rows or ready-made JSON."""

import select
import threading
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
_PATIENCE = 0.5  # seconds to wait for a connection: errors must reach the client within a second
# Likewise: PostgreSQL undoes a statement that takes longer. And the plan that holds for all parameters from the first
# execution on: the others are for a few values better, and for a million rows sometimes a sort of all of them.
_SESSION = "-c statement_timeout=800ms -c lock_timeout=800ms -c plan_cache_mode=force_generic_plan"
# How soon a network that drops everything is noticed: on connecting, on waiting for an answer, on sending.
_NETWORK = {
    "connect_timeout": 2,  # seconds; libpq knows no less
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 1,
    "tcp_user_timeout": 2000,  # milliseconds
}
_ATTEMPTS = 100  # at a statement that loses to others; of those at work at the same time, one wins each time


class _JsonAsBytes(Loader):
    """Hands over JSON as the bytes that PostgreSQL sent; it goes to the client just so."""

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


@dataclass(frozen=True)
class _Database:
    pool: ConnectionPool[psycopg.Connection[TupleRow]]
    statements: dict[str, statements.Statement]
    down: threading.Event


def init_app(app: Flask, conninfo: Callable[[], str], *, connections: int, pooler: bool) -> None:
    """Give the application a pool.

    ``conninfo`` is called for each new connection, in a thread of the pool. ``pooler`` says that a pooler in
    transaction mode is in between, such as PgBouncer: it takes no startup options, and may not have what was prepared.
    """
    down = threading.Event()  # set while the database is known to be away

    def configure(connection: psycopg.Connection[TupleRow]) -> None:
        connection.adapters.register_loader("json", _JsonAsBytes)
        down.clear()

    pool = ConnectionPool[psycopg.Connection[TupleRow]](
        conninfo if pooler else lambda: _with_options(conninfo()),
        min_size=connections,
        max_size=connections,
        timeout=_PATIENCE,
        reconnect_timeout=0,  # no waiting longer and longer: the next request tries again
        reconnect_failed=lambda _: down.set(),
        configure=configure,
        kwargs={
            "autocommit": True,  # each call is one statement
            # The statements are few: each is planned once for a connection.
            "prepare_threshold": None if pooler else 0,
            "application_name": "todo_api",
            **_NETWORK,
        },
        name="todo_api",
        open=False,  # threads and connections do not survive a fork: the worker opens it
    )
    app.extensions[_EXTENSION] = _Database(pool, statements.load(), down)


def _with_options(conninfo: str) -> str:
    options = str(conninfo_to_dict(conninfo).get("options", ""))
    return make_conninfo(conninfo, options=f"{options} {_SESSION}".strip())


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
    finally:
        database.pool.putconn(connection)
    return row[0] if row else None


def _live_connection(database: _Database) -> psycopg.Connection[TupleRow]:
    pool, down = database.pool, database.down
    if pool.closed:
        pool.open()
    while True:
        try:
            # While the database is away nobody waits for it: requests would queue behind those that do. Asking for a
            # connection makes the pool try to get one, and who comes after its success is served.
            connection = pool.getconn(timeout=0.001 if down.is_set() else None)
        except Unavailable:
            down.set()
            raise
        down.clear()
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
def check(setting: str, url: str) -> None:
    """Refuse a URL that libpq does not understand.

    Raises:
        StartError: libpq's reason.

    """
    try:
        # libpq looks at some values only when it connects: so it is asked to, where nobody listens.
        hosts = str(conninfo_to_dict(url).get("host", "")).split(",")
        psycopg.connect(make_conninfo(url, host=",".join([_NOWHERE] * len(hosts)), hostaddr=""))
    except psycopg.Error as error:
        if _NOWHERE not in str(error):
            raise StartError(f"{setting}: {error}") from error


def libpq_variables(conninfo: str) -> tuple[dict[str, str], str]:
    """Spread a connection string over libpq's environment variables; what none takes is left over as a string.

    Other users of the machine can read a command's arguments, but not its environment.
    """
    names = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults() if option.envvar}
    parts = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    variables = {names[name].decode(): value for name, value in parts.items() if name in names}
    return variables, make_conninfo("", **{name: value for name, value in parts.items() if name not in names})
