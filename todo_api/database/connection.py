"""A connection to PostgreSQL on which no request waits for long, whatever happens to the server or the network."""

import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Self

import psycopg
from psycopg.abc import RV, Buffer, PQGen
from psycopg.adapt import Loader
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
_INTERVAL = 0.14  # seconds without a byte from the server
_INTERVALS_TO_CANCEL = 4  # silent intervals after which the statement is cancelled
_INTERVALS_TO_FAIL = 6  # silent intervals after which the connection is given up
_CANCEL_TIMEOUT = 0.2  # seconds
_RETRY_TIMEOUT = 0.5  # seconds after which a statement is not tried again
_LONGEST_PAUSE = 0.02  # seconds before another try
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # a struct linger: on, for 0 seconds


class Silence(psycopg.OperationalError):
    """Nothing arrives from the server: it is stopped, or the network drops all packets."""


class Unreplicated(psycopg.OperationalError):
    """The server stopped waiting for a synchronous standby: a failover would lose what it has committed."""


class Connection(psycopg.Connection[TupleRow]):
    """A connection that cancels a silent statement, and gives up if the server stays silent."""

    # There are few statements, so that each is prepared once per connection. In autocommit mode each call is one
    # statement and its own transaction.
    arguments: dict[str, Any] = {
        "autocommit": True,
        "prepare_threshold": 0,
        "application_name": "todo_api",
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
        for name in ("json", "text"):
            self.adapters.register_loader(name, AsBytes)
        self.add_notice_handler(self._handle_notice)

    def run(self, sql: bytes, parameters: dict[str, Any]) -> psycopg.Cursor[TupleRow]:
        """Run a statement, and run it again if PostgreSQL rolled it back in favour of another one.

        That happens if the database's default isolation level is stricter than READ COMMITTED, and to end a deadlock.
        """
        deadline = time.monotonic() + _RETRY_TIMEOUT
        pause = _LONGEST_PAUSE / 16
        while True:
            try:
                return self.execute(sql, parameters)
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
                if time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0, pause))
                pause = min(2 * pause, _LONGEST_PAUSE)

    def has_ended(self) -> bool:
        """Return whether the server has closed this idle connection: then there is something to read.

        The pool's own check asks the server, which costs a round trip for each request, and after a restart it waits
        for seconds between one dead connection and the next.
        """
        try:
            readable = select.poll()  # select.select accepts file descriptors up to 1023 only
            readable.register(self.fileno(), select.POLLIN)
            return bool(readable.poll(0))
        except (psycopg.Error, OSError, ValueError):
            return True  # it cannot be examined, so that it cannot be used

    def wait(self, gen: PQGen[RV], interval: float = 0, timeout: float | None = None) -> RV:
        """Wait for one of psycopg's generators, and look for silence at an interval of our own.

        Raises:
            Silence: nothing arrived for too long; the connection must be abandoned.
            Unreplicated: the commit is not on the standby that it should be on.

        """
        del interval
        return super().wait(self._noticing_silence(gen), _INTERVAL, timeout)

    def abandon(self) -> None:
        """Close the connection, and discard what is still on its way to the server."""
        # Otherwise the kernel goes on sending, and a statement that was answered with a 503 runs once the network is
        # back.
        with socket.socket(fileno=os.dup(self.fileno())) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.close()

    def _noticing_silence(self, gen: PQGen[RV]) -> PQGen[RV]:
        """Run a generator, and count the intervals in which its socket was not ready."""
        silent = 0
        try:
            wanted = next(gen)
            while True:
                if ready := (yield wanted):
                    silent = 0
                    wanted = gen.send(ready)
                else:
                    silent += 1
                    self._handle_silence(silent)
        except StopIteration as end:
            self._check_replicated()
            value: RV = end.value
            return value

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

    def _check_replicated(self) -> None:
        if self._unreplicated:
            self._unreplicated = False
            raise Unreplicated("the wait for a synchronous standby was cancelled")


class PoolerConnection(Connection):
    """A connection to a pooler in transaction mode: it has no prepared statements and no session settings."""

    arguments = Connection.arguments | {"prepare_threshold": None}

    @classmethod
    def complete(cls, conninfo: str) -> str:
        """Return a connection string unchanged: a pooler refuses session settings."""
        return conninfo

    def configure(self) -> None:
        """Prepare the connection, and ask PostgreSQL: a pooler accepts clients while its server is away."""
        super().configure()
        self.execute(statements.load()["database/session"].rows)


class AsBytes(Loader):
    """Returns a value as the bytes that PostgreSQL sent. They go to the client unchanged."""

    def load(self, data: Buffer) -> bytes:
        """Copy the bytes."""
        return bytes(data)


def has_session_settings(conninfo: str) -> bool:
    """Return whether a session has the settings that it asked for: behind a pooler in transaction mode it has not.

    Such a pooler has no prepared statements either or, worse, another client's under the same name.

    Raises:
        UnavailableError: the database cannot be reached.

    """
    try:
        with Connection.connect(conninfo, **Connection.arguments) as connection:
            row = connection.execute(statements.load()["database/session"].rows).fetchone()
    except psycopg.OperationalError as error:
        if "unsupported startup parameter" in str(error):
            return False
        raise UnavailableError(str(error)) from error
    return row == (STATEMENT_TIMEOUT.encode(),)
