"""A connection to PostgreSQL on which no statement waits for long, whatever happens to the server or the network."""

import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import psycopg
from psycopg.pq import DiagnosticField, ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import TupleRow

from todo_api.database import statements, url
from todo_api.database.errors import UnavailableError
from todo_api.database.outage import Outage

STATEMENT_TIMEOUT = "5s"
OPTIONS = " ".join(
    f"-c {option}"
    for option in (
        "lock_timeout=500ms",
        # Ends the statements of clients that have gone. It includes the time in which a large result is sent.
        f"statement_timeout={STATEMENT_TIMEOUT}",
        # Uses a plan that suits all parameters, from the first execution on. A custom plan is faster for a few values,
        # but with a million rows it sometimes sorts all of them.
        "plan_cache_mode=force_generic_plan",
        # Let the server notice a dropped connection. By default it keeps a dropped connection for two hours.
        "tcp_keepalives_idle=5",
        "tcp_keepalives_interval=5",
        "tcp_keepalives_count=2",
        "TimeZone=UTC",  # some proxies, such as Neon's, drop the value of PGTZ that libpq sends
    )
)
# Let the client notice a dropped connection, even if no statement waits on it.
NETWORK: dict[str, Any] = {
    "connect_timeout": 2,  # seconds; libpq accepts no less
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 1,
    "tcp_user_timeout": 2000,  # milliseconds
}
# A silent server makes a statement fail after 6 x 140 ms, plus up to 0.2 s for the request to cancel the statement. If
# that request fails, the statement fails at once. Before all this, a statement waits up to 0.5 s for a connection from
# the pool. Usually a connection is available, and an error reaches the client within a second.
_INTERVAL = 140  # milliseconds without a byte from the server
_INTERVALS_TO_CANCEL = 4  # silent intervals after which the statement is cancelled
_INTERVALS_TO_FAIL = 6  # silent intervals after which the connection is abandoned
_CANCEL_TIMEOUT = 0.2  # seconds
_PAUSES = [
    *(0.001 * 2**n for n in range(7)),
    *[0.1] * 10,
]  # upper limits of the random pauses between retries, in seconds
_SUCCESS = {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # a struct linger: on, for 0 seconds


class Silence(psycopg.OperationalError):
    """The server sends nothing: it is stopped, or the network drops all packets."""


class Unreplicated(psycopg.OperationalError):
    """The server stopped waiting for a synchronous standby. A failover could lose the committed transaction."""


class Connection(psycopg.Connection[TupleRow]):
    """A connection that cancels its statement if the server is silent, and fails if the server stays silent.

    psycopg opens and closes the connection. Statements go through psycopg.pq, its interface to libpq, for three
    reasons: parameters are texts, results are passed on as bytes, and the wait for a result has limits of its own.
    """

    arguments: dict[str, Any] = {
        "autocommit": True,  # each statement is a transaction of its own
        "application_name": "todo_api",
        "client_encoding": "UTF8",
        **NETWORK,
    }
    _unreplicated = False

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        """Return a connection that is ready for use.

        Besides psycopg's arguments, this accepts ``get_conninfo``, a function that returns the connection string, and
        ``outage``, which records why a connection failed. The pool does not pass that reason on.
        """
        get_conninfo: Callable[[], str] | None = kwargs.pop("get_conninfo", None)
        outage: Outage | None = kwargs.pop("outage", None)
        try:
            conninfo = get_conninfo() if get_conninfo else conninfo
            connection = super().connect(cls.with_session_settings(conninfo), **kwargs)
            connection.configure()
        except Exception as error:
            if outage:
                outage.record_failure(error)
            raise
        if outage:
            outage.end()
        return connection

    @classmethod
    def with_session_settings(cls, conninfo: str) -> str:
        """Return a connection string with the settings of the session added."""
        return url.with_options(conninfo, OPTIONS)

    def configure(self) -> None:
        """Prepare a new connection for use."""
        self.add_notice_handler(self._handle_notice)
        self._names: dict[bytes, bytes] = {}  # from prepared statements to their names
        self._poll = select.poll()  # select.select() accepts no file descriptor above 1023
        self._poll.register(self.fileno(), select.POLLIN)

    def has_ended(self) -> bool:
        """Return whether this idle connection is closed. The socket is readable if the server has closed it.

        psycopg's own check asks the server, which costs a round trip for each statement. After a restart of the server
        it waits for seconds between two dead connections.
        """
        return self.closed or bool(self._poll.poll(0))

    def fetch(self, sql: bytes, values: Sequence[bytes]) -> tuple[bytes, ...] | None:
        """Run a statement and return its first row, or None if there is no row.

        The statement is retried if PostgreSQL rolled it back in favour of another one. PostgreSQL does so to end a
        deadlock, and if the database's default isolation level is stricter than READ COMMITTED.

        Raises:
            Silence: the server was silent for too long; the connection must be abandoned.
            Unreplicated: the synchronous standby may not have the commit.
            psycopg.Error: the statement failed.

        """
        for pause in _PAUSES:
            try:
                return self._fetch(sql, values)
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
                time.sleep(random.uniform(0, pause))
        return self._fetch(sql, values)

    def abandon(self) -> None:
        """Close the connection and discard the data that was not sent yet."""
        # Otherwise the kernel goes on sending that data, and a statement that has failed for its caller still runs when
        # the network is back.
        with socket.socket(fileno=os.dup(self.fileno())) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.close()

    def _fetch(self, sql: bytes, values: Sequence[bytes]) -> tuple[bytes, ...] | None:
        self._send(sql, values)
        result = self._result()
        if not result.ntuples:
            return None
        return tuple(result.get_value(0, column) or b"" for column in range(result.nfields))

    def _send(self, sql: bytes, values: Sequence[bytes]) -> None:
        """Send a statement, prepared. There are few statements, so each is prepared once and kept."""
        name = self._names.get(sql)
        if name is None:
            name = f"todo_api_{len(self._names)}".encode()
            self.pgconn.send_prepare(name, sql)
            self._result()
            self._names[sql] = name
        self.pgconn.send_query_prepared(name, values)

    def _result(self) -> PGresult:
        """Return the result of a statement after waiting for it."""
        results = []
        while result := self._next_result():
            results.append(result)
        for result in results:  # if the commit fails, an error follows the rows
            if result.status not in _SUCCESS:
                raise _error(result)
        if self._unreplicated:
            self._unreplicated = False
            raise Unreplicated("the wait for a synchronous standby was cancelled")
        return results[0]

    def _next_result(self) -> PGresult | None:
        """Return the next result after waiting for it, or None after the last one."""
        pgconn = self.pgconn
        silent = 0  # intervals
        while (unsent := pgconn.flush()) or pgconn.is_busy():
            self._poll.modify(pgconn.socket, select.POLLIN | select.POLLOUT if unsent else select.POLLIN)
            if self._poll.poll(_INTERVAL):
                silent = 0
                pgconn.consume_input()
            else:
                silent += 1
                self._handle_silence(silent)
        return pgconn.get_result()

    def _handle_silence(self, intervals: int) -> None:
        if intervals == _INTERVALS_TO_CANCEL:
            # The statement then ends with a result or with the error that it was cancelled, so its outcome is known.
            try:
                self.cancel_safe(timeout=_CANCEL_TIMEOUT)
            except psycopg.Error as error:
                raise Silence("the server does not accept the request to cancel the statement") from error
        if intervals == _INTERVALS_TO_FAIL:
            raise Silence("the server does not respond")

    def _handle_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        # PostgreSQL reports this with a warning. The warning's text depends on the language, its source does not.
        self._unreplicated |= notice.source_function == "SyncRepWaitForLSN"


class PoolerConnection(Connection):
    """A connection to a pooler in transaction mode, without prepared statements and session settings."""

    @classmethod
    def with_session_settings(cls, conninfo: str) -> str:
        """Return a connection string unchanged, because a pooler may reject session settings."""
        return conninfo

    def configure(self) -> None:
        """Prepare a new connection for use, and check that PostgreSQL can be reached."""
        super().configure()
        # A pooler accepts clients even if its server cannot be reached. Any statement shows that.
        self.fetch(statements.load()["database/statement_timeout"].rows, [])

    def _send(self, sql: bytes, values: Sequence[bytes]) -> None:
        """Send a statement without preparing it."""
        self.pgconn.send_query_params(sql, values)


def _error(result: PGresult) -> psycopg.Error:
    """Return psycopg's error for a failed result."""
    state = result.error_field(DiagnosticField.SQLSTATE)
    message = result.error_message.decode(errors="replace").strip()
    if state is None:
        return psycopg.OperationalError(message)  # the connection broke
    try:
        return psycopg.errors.lookup(state.decode())(message)
    except KeyError:
        return psycopg.DatabaseError(message)


def has_session_settings(conninfo: str) -> bool:
    """Return whether a new session gets the settings that it asks for.

    It does not if a pooler in transaction mode is in between. Such a pooler may not keep prepared statements either, or
    may run the statement that another client prepared under the same name.

    Raises:
        UnavailableError: the database cannot be reached.

    """
    try:
        with Connection.connect(conninfo, **Connection.arguments) as connection:
            row = connection.fetch(statements.load()["database/statement_timeout"].rows, [])
    except psycopg.OperationalError as error:
        if "unsupported startup parameter" in str(error):
            return False
        raise UnavailableError(str(error)) from error
    return row == (STATEMENT_TIMEOUT.encode(),)
