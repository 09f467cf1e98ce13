"""A connection to PostgreSQL that notices if nothing arrives from the server."""

import os
import random
import select
import socket
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Self

import psycopg
from psycopg.pq import DiagnosticField, ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import TupleRow

from todo_api.database import statements, url
from todo_api.database.errors import UnavailableError, unreachable
from todo_api.database.outage import Outage

# A statement that takes longer is cancelled, even if the server works on it. The time includes the sending of the
# result: 10 000 of the largest tasks are 90 MB.
LONGEST_STATEMENT = 60  # seconds
OPTIONS = " ".join(
    f"-c {option}"
    for option in (
        "todo.session=on",  # shows that the server has accepted these options
        "lock_timeout=500ms",  # an error must reach the client within a second; pool.py has the limit behind a pooler
        f"statement_timeout={LONGEST_STATEMENT}s",
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
_NETWORK: dict[str, str | int] = {
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 1,
    "tcp_user_timeout": 2000,  # milliseconds
}
_CONNECT_TIMEOUTS = 2, 10  # seconds; libpq accepts no less than 2
_ROUNDS = 3  # attempts to connect with and without our options
_INTERVAL = 140  # milliseconds without a byte from the server
_INTERVALS_TO_FAIL = 6  # silent intervals after which a connection is abandoned, unless the caller decides otherwise
_CANCEL_TIMEOUT = 0.2  # seconds
# In bytes. A connection keeps libpq's buffer, which has to hold the largest row. So it is closed after a larger one.
_LARGEST_KEPT = 32 * 1024 * 1024
PAUSES = [
    *(0.001 * 2**n for n in range(7)),
    *[0.1] * 10,
]  # upper limits of the random pauses between retries, in seconds
_ERRORS_OF_CLASSES: dict[bytes, type[psycopg.Error]] = {
    b"22": psycopg.DataError,
    **dict.fromkeys((b"08", b"40", b"53", b"55", b"57", b"58"), psycopg.OperationalError),
}
_SYNC = ExecStatus.PIPELINE_SYNC
_SUCCESS = {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK, _SYNC}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # a struct linger: on, for 0 seconds


class Silence(psycopg.errors.ConnectionTimeout):
    """The server sends nothing: it is stopped, or the network drops all packets."""


class Unreplicated(psycopg.OperationalError):
    """The server stopped waiting for a synchronous standby. A failover could lose the committed transaction."""


class NetworkConnection(psycopg.Connection[TupleRow]):
    """A connection with our network settings, except those that the URL, a service file or the environment sets."""

    options = ""  # for the server
    _patient = False  # whether the next attempt to connect waits longer

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        """Return a connection.

        Unless the URL or the environment sets a timeout, short and long timeouts alternate until an attempt succeeds.
        A short one soon finds the new primary after a failover. A long one reaches a database that takes some seconds
        to wake up, or to accept each connection.
        """
        began = time.monotonic()
        timeout = _CONNECT_TIMEOUTS[NetworkConnection._patient]
        completed = url.with_defaults(conninfo, cls.options, connect_timeout=timeout, **_NETWORK)
        try:
            connection = super().connect(completed, fallback_application_name="todo_api", **kwargs)
        except psycopg.Error as error:
            if isinstance(error, psycopg.errors.ConnectionTimeout):
                NetworkConnection._patient = not NetworkConnection._patient
            # The frames of the traceback refer to each other and to the socket, which would stay open until Python
            # collects garbage.
            traceback.clear_frames(error.__traceback__)
            raise
        NetworkConnection._patient = time.monotonic() - began > _CONNECT_TIMEOUTS[0]
        return connection


OnSilence = Callable[[int], None]  # called with the number of silent intervals
Query = tuple[bytes, Sequence[bytes]]  # a statement, and the values of its parameters
Values = tuple[bytes, ...]


class Connection(NetworkConnection):
    """A connection that tells the caller if nothing arrives while a statement runs.

    psycopg opens and closes the connection. Statements go through psycopg.pq, its interface to libpq, for four reasons:
    parameters are texts, results are passed on as bytes, the wait for a result has limits of its own, and a pipeline
    costs less there. See https://www.postgresql.org/docs/current/libpq-pipeline-mode.html
    """

    options = OPTIONS
    arguments: dict[str, Any] = {
        "autocommit": True,  # each statement is a transaction of its own
        "client_encoding": "UTF8",
    }
    rejected_by_server = True  # the server itself rejects connections, which shows that it responds
    _unreplicated = False

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        """Return a connection that is ready for use.

        Besides psycopg's arguments, this accepts ``get_conninfo``, a function that returns the connection string, and
        ``outage``, which records the attempt and why it failed. The pool does not pass that reason on.
        """
        get_conninfo: Callable[[], str] | None = kwargs.pop("get_conninfo", None)
        outage: Outage | None = kwargs.pop("outage", None)
        with outage.attempt() if outage else nullcontext():
            connection = super().connect(get_conninfo() if get_conninfo else conninfo, **kwargs)
            connection.configure()
            return connection

    def configure(self) -> None:
        """Prepare a new connection for use."""
        self.add_notice_handler(self._handle_notice)
        self._names: dict[bytes, bytes] = {}  # from prepared statements to their names
        # select.select() accepts no file descriptor above 1023.
        self._readable, self._readable_or_writable = select.poll(), select.poll()
        self._readable.register(self.fileno(), select.POLLIN)
        self._readable_or_writable.register(self.fileno(), select.POLLIN | select.POLLOUT)
        self.pgconn.enter_pipeline_mode()

    def has_ended(self) -> bool:
        """Return whether this idle connection is closed. The socket is readable if the server has closed it.

        psycopg's own check asks the server, which costs a round trip for each statement. After a restart of the server,
        psycopg's pool waits for seconds between two dead connections.
        """
        return self.closed or bool(self._readable.poll(0))

    @property
    def backend_pid(self) -> int:
        """Return the id of the server's process, or 0 if it is unknown."""
        return self.pgconn.backend_pid

    def fetch(self, *queries: Query, on_silence: OnSilence | None = None) -> Values | None:
        """Run statements in one transaction and one round trip.

        Return the values of the last one's rows, one row after another, or None if there is no row.

        ``on_silence`` is called after each interval in which nothing arrives. It may cancel the statement or raise
        Silence. Without it, the call fails after six such intervals.

        The transaction is retried if PostgreSQL rolled it back in favour of another one. PostgreSQL does so to end a
        deadlock, and if the database's default isolation level is stricter than READ COMMITTED.

        Raises:
            Silence: the server does not respond; the connection must be abandoned.
            Unreplicated: the synchronous standby may not have the commit.
            psycopg.Error: a statement or the commit failed.

        """
        on_silence = on_silence or _give_up
        for pause in PAUSES:
            try:
                return self._fetch(queries, on_silence)
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
                time.sleep(random.uniform(0, pause))
        return self._fetch(queries, on_silence)

    def cancel_statement(self) -> None:
        """Ask the server to cancel the statement. It then ends with a result or an error, so its outcome is known.

        Raises:
            Silence: the server does not accept the request.

        """
        try:
            self.cancel_safe(timeout=_CANCEL_TIMEOUT)
        except psycopg.Error as error:
            raise Silence("the server does not accept the request to cancel the statement") from error

    def abandon(self) -> None:
        """Close the connection and discard the data that was not sent yet."""
        # Otherwise the kernel goes on sending that data, and a statement that has failed for its caller still runs when
        # the network is back.
        with socket.socket(fileno=os.dup(self.fileno())) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.close()

    def _fetch(self, queries: Sequence[Query], on_silence: OnSilence) -> Values | None:
        self._send(queries, on_silence)
        result = self._sync(on_silence)[-1]
        if not result.ntuples:
            return None
        values = tuple(
            result.get_value(row, column) or b"" for row in range(result.ntuples) for column in range(result.nfields)
        )
        if max(map(len, values), default=0) > _LARGEST_KEPT:
            self.close()
        return values

    def _send(self, queries: Sequence[Query], on_silence: OnSilence) -> None:
        """Queue statements, prepared. There are few statements, so each is prepared once and kept."""
        for sql, _ in queries:
            if sql not in self._names:
                name = f"todo_api_{len(self._names)}".encode()
                self.pgconn.send_prepare(name, sql)
                self._sync(on_silence)
                self._names[sql] = name
        for sql, values in queries:
            self.pgconn.send_query_prepared(self._names[sql], values)

    def _sync(self, on_silence: OnSilence) -> list[PGresult]:
        """End the transaction of the queued statements, and return their results after its commit.

        If a statement fails, PostgreSQL skips those after it, so the first error is the one that counts. If the commit
        fails, its error follows the results.
        """
        self.pgconn.pipeline_sync()
        results = self._results(on_silence)
        for result in results:
            if result.status not in _SUCCESS:
                raise _error(result)
        if not results or results.pop().status != _SYNC:
            raise psycopg.OperationalError("the connection broke before the commit was confirmed")
        if self._unreplicated:
            self._unreplicated = False
            raise Unreplicated("the wait for a synchronous standby was cancelled")
        return results

    def _results(self, on_silence: OnSilence) -> list[PGresult]:
        """Send what is queued, wait, and return the results up to that of the Sync, which comes after the commit."""
        pgconn = self.pgconn
        results: list[PGresult] = []
        unsent = pgconn.flush()
        silent = 0  # intervals
        while True:
            while unsent or pgconn.is_busy():
                if (self._readable_or_writable if unsent else self._readable).poll(_INTERVAL):
                    silent = 0
                    pgconn.consume_input()
                    unsent = unsent and pgconn.flush()
                else:
                    silent += 1
                    on_silence(silent)
            result = pgconn.get_result()
            if not result:  # the connection broke
                return results
            results.append(result)
            if result.status == _SYNC:
                return results
            pgconn.get_result()  # None: a statement has one result. is_busy() would release the interpreter lock

    def _handle_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        # PostgreSQL reports this with a warning. The warning's text depends on the language, its source does not.
        self._unreplicated |= notice.source_function == "SyncRepWaitForLSN"


class UnpreparedConnection(Connection):
    """A connection without prepared statements."""

    def _send(self, queries: Sequence[Query], on_silence: OnSilence) -> None:
        """Queue statements without preparing them."""
        del on_silence
        for sql, values in queries:
            self.pgconn.send_query_params(sql, values)


class PoolerConnection(UnpreparedConnection):
    """A connection to a pooler in transaction mode, without prepared statements and session settings."""

    options = ""  # a pooler may reject them
    backend_pid = 0  # a pooler invents one
    rejected_by_server = False  # a pooler rejects connections itself while its server is down

    def configure(self) -> None:
        """Prepare a new connection for use, and check that PostgreSQL can be reached."""
        super().configure()
        # A pooler accepts clients even if its server cannot be reached. Any statement shows that.
        self.fetch(statements.load()["database/session"].query())


def _give_up(silent_intervals: int) -> None:
    if silent_intervals == _INTERVALS_TO_FAIL:
        raise Silence("the server does not respond")


def _error(result: PGresult) -> psycopg.Error:
    """Return psycopg's error for a failed result."""
    state = result.error_field(DiagnosticField.SQLSTATE)
    # The whole message would have DETAIL, which may contain data, and for some statements a position.
    primary = result.error_field(DiagnosticField.MESSAGE_PRIMARY) or result.error_message
    message = primary.decode(errors="replace").strip()
    if state is None:
        return psycopg.OperationalError(message)  # the connection broke
    try:
        return psycopg.errors.lookup(state.decode())(message)
    except KeyError:  # a code of an extension or a proxy: its first two characters are its class
        return _ERRORS_OF_CLASSES.get(state[:2], psycopg.DatabaseError)(message)


def has_session_settings(conninfo: str) -> bool:
    """Return whether a new session gets the settings that it asks for.

    It does not if a pooler in transaction mode is in between. Such a pooler may not keep prepared statements either, or
    may run the statement that another client prepared under the same name.

    Raises:
        UnavailableError: the database cannot be reached.

    """
    # Poolers and proxies reject the settings with many different errors. So the settings count as rejected if, three
    # times in a row, an attempt fails with them and the next one succeeds without them. Once may be chance, while a
    # server starts or is out of connections.
    for _ in range(_ROUNDS):
        try:
            return _session_setting(UnpreparedConnection, conninfo) == (b"on",)
        except psycopg.errors.ConnectionTimeout as error:
            raise unreachable(error) from error
        except psycopg.OperationalError as error:
            rejection = error
        try:
            _session_setting(PoolerConnection, conninfo)
        except psycopg.OperationalError:
            raise UnavailableError(str(rejection)) from rejection
    return False


def _session_setting(connection_class: type[Connection], conninfo: str) -> Values | None:
    with connection_class.connect(conninfo, **connection_class.arguments) as connection:
        return connection.fetch(statements.load()["database/session"].query())


def connection_limit(conninfo: str) -> int:
    """Return how many connections the server allows to the role of a connection string.

    Raises:
        UnavailableError: the database cannot be reached.

    """
    try:
        with UnpreparedConnection.connect(conninfo, **Connection.arguments) as connection:
            row = connection.fetch(statements.load()["database/connection_limit"].query())
    except psycopg.Error as error:
        raise unreachable(error) from error
    return int(row[0]) if row else 0
