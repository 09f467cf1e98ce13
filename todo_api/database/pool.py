"""The pool of connections. A statement gets a working connection, or fails within about half a second."""

import time
from collections.abc import Callable, Sequence

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout

from todo_api.database.connection import Connection, PoolerConnection, Silence
from todo_api.database.errors import UnavailableError
from todo_api.database.outage import Outage

_WAIT = 0.5  # seconds for a connection; with more, an error would take too long to reach the client
_POLL = 0.01  # seconds between two checks for an outage
_FILL_TIMEOUT = 2  # seconds; during a reload, the old workers still serve in this time


class Pool:
    """psycopg's pool with two changes: no statement waits during an outage, and none gets a dead connection."""

    def __init__(self, get_conninfo: Callable[[], str], size: int, *, pooler: bool) -> None:
        """Create a closed pool. Its threads and connections would not survive a fork, so each worker opens its own."""
        connection_class = PoolerConnection if pooler else Connection
        self.outage = Outage()
        self._size = size
        self._pool = ConnectionPool(
            connection_class=connection_class,
            kwargs=connection_class.arguments | {"get_conninfo": get_conninfo, "outage": self.outage},
            min_size=size,
            max_size=size,
            reconnect_timeout=0,  # no backoff: the next statement makes the pool connect again
            reconnect_failed=self._reconnect_failed,
            name="todo_api",
            open=False,
        )

    def fill(self) -> None:
        """Open all connections, so that the first statements need not wait. Return early if an outage is active."""
        self._pool.open()
        deadline = time.monotonic() + _FILL_TIMEOUT
        while self._pool.get_stats()["pool_available"] < self._size:
            if self.outage.active or time.monotonic() > deadline:
                return
            time.sleep(_POLL)

    def fetch(self, sql: bytes, values: Sequence[bytes]) -> tuple[bytes, ...] | None:
        """Run a statement and return its first row, or None if there is no row.

        Raises:
            UnavailableError: no connection is available.
            psycopg.Error: the statement failed.

        """
        connection = self._get_working()
        try:
            return connection.fetch(sql, values)
        except Silence:
            connection.abandon()
            self._pool.drain()  # so that no other statement waits on a connection to the same silent server
            raise
        except psycopg.errors.ReadOnlySqlTransaction:
            # The server is no longer the primary. libpq checks target_session_attrs only when it connects.
            self._pool.drain()
            raise
        finally:
            self._pool.putconn(connection)

    def _get_working(self) -> Connection:
        if self._pool.closed:
            self._pool.open()
        while True:
            connection = self._get()
            if not connection.has_ended():
                self.outage.end()
                return connection
            connection.close()
            self._pool.putconn(connection)  # the pool then opens a new one

    def _get(self) -> Connection:
        """Take a connection out of the pool.

        During an outage no statement waits, because later statements would queue behind the waiting ones. But the call
        makes the pool connect in the background. The outage ends when that succeeds.
        """
        deadline = time.monotonic() + _WAIT
        while True:
            try:
                return self._pool.getconn(timeout=_POLL)
            except PoolTimeout:
                if self.outage.active or time.monotonic() > deadline:
                    break
        self.outage.begin()
        raise UnavailableError("no connection to the database is available")

    def _reconnect_failed(self, pool: ConnectionPool[Connection]) -> None:
        if not pool.get_stats()["pool_size"]:  # otherwise it is worth waiting for one of the open connections
            self.outage.begin()
