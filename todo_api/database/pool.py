"""The pool of connections. A statement gets a working connection, or fails within about half a second."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

from todo_api.database import statements
from todo_api.database.connection import (
    LONGEST_STATEMENT,
    Connection,
    OnSilence,
    PoolerConnection,
    Query,
    Silence,
    Values,
)
from todo_api.database.errors import UnavailableError
from todo_api.database.outage import Outage

_WAIT = 0.5  # seconds for a connection; with more, an error would take too long to reach the client
_POLL = 0.01  # seconds between two checks for an outage
# psycopg's pool keeps each call that timed out until it has a connection again. This limits how many it keeps.
_MAX_WAITING = 100
# Seconds for the first connection, and again for the others. Meanwhile, new clients wait for this worker.
_FILL_TIMEOUT = 2
# A statement may be silent because it takes a long time, such as a search through a million tasks. So after every two
# intervals of 140 ms, another connection asks the server about it. If the server does not respond there either, the
# statement fails after 0.7 s. If the statement waits for a lock or a standby, it is cancelled.
_INTERVALS_TO_ASK = 2
_INTERVALS_TO_CANCEL = 4
_ASK_TIMEOUT = 0.4  # seconds


@dataclass(frozen=True)
class State:
    """The connections of a pool, those that are idle, the threads that wait for one, and whether there is an outage."""

    size: int
    available: int
    waiting: int
    outage: bool


class Pool:
    """psycopg's pool with two changes: no statement waits during an outage, and none gets a dead connection."""

    def __init__(self, get_conninfo: Callable[[], str], get_share: Callable[[], int | None], *, pooler: bool) -> None:
        """Create a closed pool. Its threads and connections would not survive a fork, so each worker opens its own.

        It opens one connection first, since only then the process knows its share of the server's connections.
        """
        connection_class = PoolerConnection if pooler else Connection
        self.outage = Outage()
        self._get_share = get_share
        self._size = 1
        self._busy: set[Connection] = set()  # the connections on which a statement runs
        self._waiting: set[int] = set()  # the threads that have waited for a connection for 10 ms or more
        self._asking = threading.Lock()
        loaded = statements.load()
        self._question = loaded["database/waits"]
        # PostgreSQL shows the statements of a login role to that role. A session may begin with another role.
        self._as_login_role = loaded["database/identify"].query(role="none", user_id="")
        self._pool = ConnectionPool(
            connection_class=connection_class,
            kwargs=connection_class.arguments | {"get_conninfo": get_conninfo, "outage": self.outage},
            min_size=1,
            max_size=1,
            max_waiting=_MAX_WAITING,
            reconnect_timeout=0,  # no backoff: the next statement makes the pool connect again
            reconnect_failed=self._reconnect_failed,
            name="todo_api",
            open=False,
        )

    def fill(self, size: int) -> None:
        """Open this many connections, so that the first statements need not wait. Return early in an outage."""
        self._pool.open()
        if self._wait_until_full():
            self._resize(min(size, self._get_share() or size))
            self._wait_until_full()

    def state(self) -> State:
        """Return the state of the pool now.

        In an outage, this tries to connect. If there are no requests, nothing else would find out that it has ended.
        """
        if self.outage.active:
            with suppress(UnavailableError):
                self._pool.putconn(self._get_working(time.monotonic()))
        stats = self._pool.get_stats()  # its requests_waiting also has calls that have timed out
        return State(stats["pool_size"], stats["pool_available"], len(self._waiting), outage=self.outage.active)

    def _wait_until_full(self) -> bool:
        deadline = time.monotonic() + _FILL_TIMEOUT
        while self._pool.get_stats()["pool_available"] < self._size:
            if self.outage.active or time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True

    def _resize(self, size: int) -> None:
        self._size = size
        self._pool.resize(size, size)

    def fetch(self, *queries: Query) -> Values | None:
        """Run statements in one transaction, and return the values of the last one's rows, or None if there is no row.

        Raises:
            UnavailableError: no connection is available.
            psycopg.Error: a statement or the commit failed.

        """
        connection = self._get_working(time.monotonic() + _WAIT)
        latest = time.monotonic() + LONGEST_STATEMENT
        cancelled = False

        def on_silence(intervals: int) -> None:
            nonlocal cancelled
            if intervals % _INTERVALS_TO_ASK:
                return
            if cancelled:
                raise Silence("the server does not cancel the statement")
            waits = self._waits_for_others(connection, queries[-1][0])
            if (waits and intervals >= _INTERVALS_TO_CANCEL) or time.monotonic() > latest:
                connection.cancel_statement()
                cancelled = True

        return self._run(connection, *queries, on_silence=on_silence)

    def _run(self, connection: Connection, *queries: Query, on_silence: OnSilence) -> Values | None:
        self._busy.add(connection)
        try:
            return connection.fetch(*queries, on_silence=on_silence)
        except Silence:
            connection.abandon()
            # So that no other statement waits for the same silent server. The outage ends with the next connection.
            self._pool.drain()
            self.outage.begin()
            raise
        except psycopg.errors.ReadOnlySqlTransaction:
            # The server is no longer the primary. libpq checks target_session_attrs only when it connects.
            self._pool.drain()
            raise
        finally:
            self._busy.discard(connection)
            self._pool.putconn(connection)

    def _waits_for_others(self, silent: Connection, sql: bytes) -> bool:
        """Return whether a silent statement waits for a lock or a standby. The server is asked on another connection.

        Raises:
            Silence: the server does not respond.

        """
        asked = time.monotonic()
        try:
            question = self._question.query(pid=silent.backend_pid, statement=sql.decode())
            row = self._ask(question, asked + _ASK_TIMEOUT)
        except UnavailableError as error:
            # A server that rejects connections, for example because it allows no more, does respond.
            if not silent.rejected_by_server or self.outage.responded_at < asked:
                raise Silence("the server does not respond, and accepts no other connection") from error
            return False
        return row == (b"t",)

    def _ask(self, question: Query, deadline: float) -> Values | None:
        """Ask the server what a statement waits for. One thread asks at a time."""

        def on_silence(_: int) -> None:
            if time.monotonic() > deadline:
                raise Silence("the server does not respond on two connections")

        if not self._asking.acquire(timeout=deadline - time.monotonic()):
            raise UnavailableError("other threads are asking the server")
        try:
            connection = self._get_working(deadline, to_ask=True)
            return self._run(connection, self._as_login_role, question, on_silence=on_silence)
        finally:
            self._asking.release()

    def _get_working(self, deadline: float, *, to_ask: bool = False) -> Connection:
        if self._pool.closed:
            self._pool.open()
        while True:
            connection = self._get(deadline, to_ask=to_ask)
            if not connection.has_ended():
                self.outage.end()
                return connection
            connection.close()
            self._pool.putconn(connection)  # the pool then opens a new one

    def _get(self, deadline: float, *, to_ask: bool) -> Connection:
        """Take a connection out of the pool.

        During an outage no statement waits, because later statements would queue behind the waiting ones. But the call
        makes the pool connect in the background. The outage ends when that succeeds. An outage begins only if
        connecting fails or hangs. If all connections are busy, that is no outage.
        """
        try:
            return self._wait(time.monotonic(), deadline, to_ask=to_ask)
        finally:
            self._waiting.discard(threading.get_ident())

    def _wait(self, began: float, deadline: float, *, to_ask: bool) -> Connection:
        while True:
            try:
                return self._pool.getconn(timeout=_POLL)
            except (PoolTimeout, TooManyRequests) as error:
                self._waiting.add(threading.get_ident())
                if isinstance(error, TooManyRequests):
                    self._pool.check()  # makes the empty pool connect, which getconn() has not done
                    time.sleep(_POLL)
                late = time.monotonic() > deadline
                most = (self._get_share() or inf) + to_ask
                if self._size <= len(self._busy) < most:  # a thread has no connection, or one is needed to ask
                    self._resize(len(self._busy) + 1)
                elif not self._busy and self._connecting_fails(began, late=late):
                    self.outage.begin()
                if self.outage.active:
                    raise UnavailableError("no connection to the database is available") from None
                if late:
                    raise UnavailableError("all connections to the database are busy") from None

    def _connecting_fails(self, began: float, *, late: bool) -> bool:
        return self.outage.connecting_for() > _WAIT or (late and self.outage.failed_at > began)

    def _reconnect_failed(self, pool: ConnectionPool[Connection]) -> None:
        if not pool.get_stats()["pool_size"]:  # otherwise it is worth waiting for one of the open connections
            self.outage.begin()
