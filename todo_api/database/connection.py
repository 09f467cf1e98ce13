"""A connection to PostgreSQL on which no request waits for long, whatever happens to the server or the network."""

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
        # For statements whose client has gone. It is longer, because it includes the sending of a large answer.
        f"statement_timeout={STATEMENT_TIMEOUT}",
        # The plan that suits all parameters, from the first execution on. A custom plan is better for a few values,
        # but with a million rows it sometimes sorts them all.
        "plan_cache_mode=force_generic_plan",
        # The server notices a connection that the network has dropped; by default it keeps such a one for two hours.
        "tcp_keepalives_idle=5",
        "tcp_keepalives_interval=5",
        "tcp_keepalives_count=2",
        "TimeZone=UTC",  # some proxies, such as Neon's, drop what libpq sends for PGTZ
    )
)
# With these, a dropped connection is noticed even if nobody waits for an answer on it.
NETWORK: dict[str, Any] = {
    "connect_timeout": 2,  # seconds; libpq accepts no less
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 1,
    "tcp_user_timeout": 2000,  # milliseconds
}
# An error must reach the client within a second.
_INTERVAL = 140  # milliseconds without a byte from the server
_INTERVALS_TO_CANCEL = 4  # silent intervals after which the statement is cancelled
_INTERVALS_TO_FAIL = 6  # silent intervals after which the connection is given up
_CANCEL_TIMEOUT = 0.2  # seconds
_PAUSES = [0.001, 0.002, 0.004, 0.008, *[0.016] * 46]  # at most, in seconds, before a statement is tried again
_SUCCESS = {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # a struct linger: on, for 0 seconds


class Silence(psycopg.OperationalError):
    """Nothing arrives from the server: it is stopped, or the network drops all packets."""


class Unreplicated(psycopg.OperationalError):
    """The server stopped waiting for a synchronous standby: a failover would lose what it has committed."""


class Connection(psycopg.Connection[TupleRow]):
    """A connection that cancels a silent statement, and gives up if the server stays silent.

    psycopg makes and closes it. The statements go through psycopg.pq, its interface to libpq: they are few, their
    parameters are texts, their results are passed on as bytes, and the wait for a result is ours.
    """

    arguments: dict[str, Any] = {
        "autocommit": True,  # each call is one statement, and its own transaction
        "application_name": "todo_api",
        "client_encoding": "UTF8",
        **NETWORK,
    }
    _unreplicated = False

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        """Return a connection that is ready for use, and tell the outage if there is none.

        Beside psycopg's arguments it accepts ``source``, a function that returns the connection string, and
        ``outage``. So the outage learns of every reason: the pool would only log it.
        """
        source: Callable[[], str] | None = kwargs.pop("source", None)
        outage: Outage | None = kwargs.pop("outage", None)
        try:
            connection = super().connect(cls.complete(source() if source else conninfo), **kwargs)
            connection.configure()
        except Exception as error:
            if outage:
                outage.failed(error)
            raise
        if outage:
            outage.end()
        return connection

    @classmethod
    def complete(cls, conninfo: str) -> str:
        """Return a connection string with the session's settings."""
        return url.with_options(conninfo, OPTIONS)

    def configure(self) -> None:
        """Prepare the connection for use, once."""
        self.add_notice_handler(self._handle_notice)
        self._names: dict[bytes, bytes] = {}  # of the statements that are prepared
        self._poll = select.poll()  # select.select accepts file descriptors up to 1023 only
        self._poll.register(self.fileno(), select.POLLIN)

    def has_ended(self) -> bool:
        """Return whether the server has closed this idle connection: then there is something to read.

        The pool's own check asks the server, which costs a round trip for each request, and after a restart it waits
        for seconds between one dead connection and the next.
        """
        return self.closed or bool(self._poll.poll(0))

    def fetch(self, sql: bytes, values: Sequence[bytes]) -> tuple[bytes, ...] | None:
        """Run a statement and return its first row, or None if there is no row.

        The statement is tried again if PostgreSQL rolled it back in favour of another one. That happens if the
        database's default isolation level is stricter than READ COMMITTED, and to end a deadlock.

        Raises:
            Silence: nothing arrived for too long; the connection must be abandoned.
            Unreplicated: the commit is not on the standby that it should be on.
            psycopg.Error: the statement failed.

        """
        for pause in _PAUSES:
            try:
                return self._fetch(sql, values)
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
                time.sleep(random.uniform(0, pause))
        return self._fetch(sql, values)

    def abandon(self) -> None:
        """Close the connection, and discard what is still on its way to the server."""
        # Otherwise the kernel goes on sending, and a statement that was answered with a 503 runs once the network is
        # back.
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
        """Send a prepared statement. There are few statements, so that each is prepared once per connection."""
        name = self._names.get(sql)
        if name is None:
            name = f"todo_api_{len(self._names)}".encode()
            self.pgconn.send_prepare(name, sql)
            self._result()
            self._names[sql] = name
        self.pgconn.send_query_prepared(name, values)

    def _result(self) -> PGresult:
        """Wait until a statement is done, and return its result."""
        results = []
        while result := self._next_result():
            results.append(result)
        for result in results:  # an error can follow the rows, if the commit fails
            if result.status not in _SUCCESS:
                raise _error(result)
        if self._unreplicated:
            self._unreplicated = False
            raise Unreplicated("the wait for a synchronous standby was cancelled")
        return results[0]

    def _next_result(self) -> PGresult | None:
        """Wait for the next result, or None after the last one, and notice if nothing arrives for too long."""
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
            # The answer to this tells what became of the statement.
            try:
                self.cancel_safe(timeout=_CANCEL_TIMEOUT)
            except psycopg.Error as error:
                raise Silence("the server accepts no request to cancel") from error
        if intervals == _INTERVALS_TO_FAIL:
            raise Silence("no answer from the server")

    def _handle_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        # PostgreSQL reports this in a warning, whose text depends on its language.
        self._unreplicated |= notice.source_function == "SyncRepWaitForLSN"


class PoolerConnection(Connection):
    """A connection to a pooler in transaction mode: it has no prepared statements and no session settings."""

    @classmethod
    def complete(cls, conninfo: str) -> str:
        """Return a connection string unchanged: a pooler refuses session settings."""
        return conninfo

    def configure(self) -> None:
        """Prepare the connection, and ask PostgreSQL: a pooler accepts clients while its server is away."""
        super().configure()
        self.fetch(statements.load()["database/session"].rows, [])

    def _send(self, sql: bytes, values: Sequence[bytes]) -> None:
        """Send a statement without a name."""
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
    """Return whether a session has the settings that it asked for: behind a pooler in transaction mode it has not.

    Such a pooler has no prepared statements either or, worse, another client's under the same name.

    Raises:
        UnavailableError: the database cannot be reached.

    """
    try:
        with Connection.connect(conninfo, **Connection.arguments) as connection:
            row = connection.fetch(statements.load()["database/session"].rows, [])
    except psycopg.OperationalError as error:
        if "unsupported startup parameter" in str(error):
            return False
        raise UnavailableError(str(error)) from error
    return row == (STATEMENT_TIMEOUT.encode(),)
