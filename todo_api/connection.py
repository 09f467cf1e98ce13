"""A connection to PostgreSQL on which nobody waits for long, whatever becomes of the server or the network."""

from contextlib import suppress
from typing import Any

import psycopg
from psycopg.abc import RV, Buffer, PQGen
from psycopg.adapt import Loader
from psycopg.rows import TupleRow

# PostgreSQL undoes a statement that takes longer, or that waits longer for a lock. And the plan that holds for all
# parameters from the first execution on: the others are for a few values better, and for a million rows sometimes a
# sort of all of them.
OPTIONS = "-c statement_timeout=800ms -c lock_timeout=800ms -c plan_cache_mode=force_generic_plan"
# A connection that the network drops is noticed even where nobody waits for an answer.
_NETWORK = {
    "connect_timeout": 2,  # seconds; libpq knows no less
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 1,
    "tcp_user_timeout": 2000,  # milliseconds
}


class Silence(psycopg.OperationalError):
    """Nothing comes from the server: it is stopped, or busy without end, or the network drops everything."""


class Connection(psycopg.Connection[TupleRow]):
    """A connection that gives up when nothing comes."""

    # The statements are few: each is planned once for a connection. Each call is one, and so its own transaction.
    arguments: dict[str, Any] = {
        "autocommit": True,
        "prepare_threshold": 0,
        "application_name": "todo_api",
        **_NETWORK,
    }
    silence = 0.9  # seconds without a byte; by then the server would have ended the statement itself

    def wait(self, gen: PQGen[RV], interval: float = 0, timeout: float | None = None) -> RV:
        """Wait for what one of psycopg's generators gives; the interval at which it looks up is ours.

        Raises:
            Silence: nothing came for so long that nobody should wait any more.

        """
        del interval
        return super().wait(_heard(gen), self.silence, timeout)

    def abandon(self) -> None:
        """Close it in the middle of a statement."""
        self.close()


class PoolerConnection(Connection):
    """A connection to a pooler in transaction mode, such as PgBouncer.

    It takes no startup options, so that the server knows no limits, and may not have what was prepared.
    """

    arguments = Connection.arguments | {"prepare_threshold": None}
    silence = 0.6  # seconds; sooner, because it has to cancel the statement itself

    def abandon(self) -> None:
        """Cancel the statement, which the pooler would let go on, and close it."""
        with suppress(psycopg.Error):
            self.cancel_safe(timeout=0.3)  # seconds; errors must reach the client within a second
        self.close()


def _heard(gen: PQGen[RV]) -> PQGen[RV]:
    """Pass on what a generator asks and what it is told, until it is told that there is nothing."""
    try:
        wanted = next(gen)
        while True:
            if not (ready := (yield wanted)):
                raise Silence("no answer from the server")
            wanted = gen.send(ready)
    except StopIteration as end:
        value: RV = end.value
        return value


class _JsonAsBytes(Loader):
    """Hands over JSON as the bytes that PostgreSQL sent; it goes to the client just so."""

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


def take_json_as_bytes(connection: Connection) -> None:
    """Make a connection give JSON as bytes."""
    connection.adapters.register_loader("json", _JsonAsBytes)
