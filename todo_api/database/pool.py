"""The pool of connections: hands out a connection that works, or fails at once if there can be none."""

import time
from collections.abc import Callable, Sequence

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout

from todo_api.database.connection import Connection, PoolerConnection, Silence
from todo_api.database.errors import UnavailableError
from todo_api.database.outage import Outage

_WAIT = 0.5  # seconds for a connection; an error must reach the client within a second
_POLL = 0.01  # seconds between two checks whether there can be a connection at all
_FILL_TIMEOUT = 2  # seconds; meanwhile the old workers still serve


class Pool:
    """psycopg's pool, with an outage that requests do not wait for, and without dead connections."""

    def __init__(self, conninfo: Callable[[], str], size: int, *, pooler: bool) -> None:
        """Create it closed: threads and connections do not survive a fork, so that each worker opens its own."""
        connection_class = PoolerConnection if pooler else Connection
        self.outage = Outage()
        self._size = size
        self._pool = ConnectionPool(
            connection_class=connection_class,
            kwargs=connection_class.arguments | {"source": conninfo, "outage": self.outage},
            min_size=size,
            max_size=size,
            reconnect_timeout=0,  # no backoff: the next request tries again
            reconnect_failed=self._reconnect_failed,
            name="todo_api",
            open=False,
        )

    def fill(self) -> None:
        """Open all connections, so that the first requests need not wait; return early during an outage."""
        self._pool.open()
        deadline = time.monotonic() + _FILL_TIMEOUT
        while self._pool.get_stats()["pool_available"] < self._size:
            if self.outage.active or time.monotonic() > deadline:
                return
            time.sleep(_POLL)

    def fetch(self, sql: bytes, values: Sequence[bytes]) -> tuple[bytes, ...] | None:
        """Run a statement on a live connection, and return its first row, or None if there is no row.

        Raises:
            UnavailableError: there is no connection.
            psycopg.Error: the statement failed.

        """
        connection = self._get_live()
        try:
            return connection.fetch(sql, values)
        except Silence:
            connection.abandon()
            self._pool.drain()  # so that no other request has to wait for the same silence
            raise
        except psycopg.errors.ReadOnlySqlTransaction:
            # The server was the primary when it was connected to: libpq checks target_session_attrs only then.
            self._pool.drain()
            raise
        finally:
            self._pool.putconn(connection)

    def _get_live(self) -> Connection:
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

        During an outage nobody waits, because later requests would queue behind the waiting ones. But the call makes
        the pool connect, and once that succeeds requests are served again.
        """
        deadline = time.monotonic() + _WAIT
        while True:
            try:
                return self._pool.getconn(timeout=_POLL)
            except PoolTimeout:
                if self.outage.active or time.monotonic() > deadline:
                    break
        self.outage.begin()
        raise UnavailableError("no connection to the database")

    def _reconnect_failed(self, pool: ConnectionPool[Connection]) -> None:
        if not pool.get_stats()["pool_size"]:  # as long as there are some, it is worth waiting for one of them
            self.outage.begin()
