"""A connection to PostgreSQL on which nobody waits for long, whatever becomes of the server or the network."""

import os
import socket
import struct
from typing import Any

import psycopg
from psycopg.abc import RV, Buffer, PQGen
from psycopg.adapt import Loader
from psycopg.rows import TupleRow

STATEMENT_TIMEOUT = "5s"
OPTIONS = " ".join(
    f"-c {option}"
    for option in (
        "lock_timeout=500ms",
        # For statements whose client is gone; it is longer, since it counts the sending of a large answer, too.
        f"statement_timeout={STATEMENT_TIMEOUT}",
        # The plan that holds for all parameters, from the first execution on: the others are for a few values better,
        # and for a million rows sometimes a sort of all of them.
        "plan_cache_mode=force_generic_plan",
        # The server, too, notices that the network dropped a connection: by default it keeps that for two hours.
        "tcp_keepalives_idle=5",
        "tcp_keepalives_interval=5",
        "tcp_keepalives_count=2",
        "TimeZone=UTC",  # also where a proxy, such as Neon's, drops libpq's own setting of it
    )
)
# A connection that the network drops is noticed even where nobody waits for an answer.
NETWORK: dict[str, Any] = {
    "connect_timeout": 2,  # seconds; libpq knows no less
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 1,
    "tcp_user_timeout": 2000,  # milliseconds
}
_INTERVAL = 0.14  # seconds without a byte from the server; after
_PATIENCE = 4  # of these a statement is cancelled, and after
_END = 6  # nobody waits any more: errors must reach the client within a second
_CANCEL = 0.2  # seconds to ask for that
_NO_LINGERING = struct.pack("ii", 1, 0)


class Silence(psycopg.OperationalError):
    """Nothing comes from the server: it is stopped, or the network drops everything."""


class Unreplicated(psycopg.OperationalError):
    """The server gave up waiting for a synchronous standby: a failover would lose what it has committed."""


class Connection(psycopg.Connection[TupleRow]):
    """A connection that cancels a statement on which nothing comes, and gives up when nothing comes then."""

    # The statements are few: each is planned once for a connection. Each call is one, and so its own transaction.
    arguments: dict[str, Any] = {
        "autocommit": True,
        "prepare_threshold": 0,
        "application_name": "todo_api",
        **NETWORK,
    }
    _unreplicated = False
    # For answers of one row, since it holds on to the last. To make one for each statement took 7 us of 53.
    kept_cursor: psycopg.Cursor[TupleRow]

    def configure(self) -> None:
        """Make it ready for use, once."""
        self.adapters.register_loader("json", JsonAsBytes)
        self.add_notice_handler(self._heed)
        self.kept_cursor = self.cursor()

    def wait(self, gen: PQGen[RV], interval: float = 0, timeout: float | None = None) -> RV:
        """Wait for what one of psycopg's generators gives; the interval at which it looks up is ours.

        Raises:
            Silence: nothing came for so long that nobody should wait any more; the connection is to be abandoned.
            Unreplicated: it is committed where a failover would lose it.

        """
        del interval
        return super().wait(self._heard(gen), _INTERVAL, timeout)

    def abandon(self) -> None:
        """Close it, and with it what is still on its way to the server."""
        # Otherwise the kernel goes on sending, and what was answered with a 503 is done when the network is back.
        with socket.socket(fileno=os.dup(self.fileno())) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        self.close()

    def _heard(self, gen: PQGen[RV]) -> PQGen[RV]:
        """Pass on what a generator asks and what it is told, until it is told too often that there is nothing."""
        silent = 0
        try:
            wanted = next(gen)
            while True:
                if ready := (yield wanted):
                    silent = 0
                    wanted = gen.send(ready)
                else:
                    silent += 1
                    self._lose_patience(silent)
        except StopIteration as end:
            self._check_replicated()
            value: RV = end.value
            return value

    def _lose_patience(self, silent: int) -> None:
        if silent == _PATIENCE:
            # What became of the statement is in the answer that this brings about.
            try:
                self.cancel_safe(timeout=_CANCEL)
            except psycopg.Error as error:
                raise Silence("nobody takes the request to cancel") from error
        if silent == _END:
            raise Silence("no answer from the server")

    def _heed(self, notice: psycopg.errors.Diagnostic) -> None:
        # PostgreSQL says so of a commit in a mere warning, whose text depends on its language.
        self._unreplicated |= notice.source_function == "SyncRepWaitForLSN"

    def _check_replicated(self) -> None:
        if self._unreplicated:
            self._unreplicated = False
            raise Unreplicated("the wait for a synchronous standby was cancelled")


class PoolerConnection(Connection):
    """A connection to a pooler in transaction mode, such as PgBouncer: it may not have what was prepared."""

    arguments = Connection.arguments | {"prepare_threshold": None}


class JsonAsBytes(Loader):
    """Hands over JSON as the bytes that PostgreSQL sent; it goes to the client just so."""

    def load(self, data: Buffer) -> bytes:
        """Copy the bytes."""
        return bytes(data)
