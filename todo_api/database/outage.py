"""Keeps track of whether the database can be reached, and logs when that changes."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

# Seconds between two log lines about a changed reason. Some reasons contain a process id, so they change each time.
_QUIET = 5
_UNKNOWN = "it does not respond"

log = logging.getLogger(__name__)


class Outage:
    """An outage of the database. While it is ``active``, statements fail without waiting for a connection."""

    def __init__(self) -> None:
        """Create an inactive outage."""
        self.active = False
        self._reason = _UNKNOWN
        self._quiet_until = 0.0
        self._lock = threading.Lock()
        self._attempts: dict[object, float] = {}  # the attempts to connect that are in progress, and their start times
        self.failed_at = 0.0  # when the last attempt failed
        self.responded_at = 0.0  # when the server last responded to an attempt, even if it rejected the connection

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Record an attempt to connect and its outcome. If it succeeds, the outage ends."""
        self._attempts[attempt := object()] = time.monotonic()
        try:
            yield
        except Exception as error:
            self.record_failure(error)
            raise
        finally:
            del self._attempts[attempt]
        self.responded_at = time.monotonic()
        self.end()

    def connecting_for(self) -> float:
        """Return for how many seconds the oldest attempt to connect has been in progress."""
        now = time.monotonic()
        return now - min(list(self._attempts.values()), default=now)

    def record_failure(self, error: Exception) -> None:
        """Record why an attempt to connect failed. During an outage, log the reason if it has changed.

        This does not change ``active``: other connections may still work.
        """
        self.failed_at = time.monotonic()
        if not isinstance(error, psycopg.errors.ConnectionTimeout):
            self.responded_at = self.failed_at
        reason = str(error).partition("\n")[0]
        with self._lock:
            if self.active and (reason == self._reason or time.monotonic() < self._quiet_until):
                return
            self._reason = reason
            if self.active:
                self._quiet_until = time.monotonic() + _QUIET
                log.warning("the database still cannot be reached: %s", reason)

    def begin(self) -> None:
        """Set ``active`` and log that the database cannot be reached, unless the outage is active already."""
        with self._lock:
            if not self.active:
                log.warning("the database cannot be reached; statements fail until it can: %s", self._reason)
                self.active = True
                self._quiet_until = time.monotonic() + _QUIET

    def end(self) -> None:
        """Clear ``active`` and log that the database can be reached again, if the outage is active."""
        if not self.active:  # the usual case needs no lock
            return
        with self._lock:
            if self.active:
                log.warning("the database can be reached again")
                self.active = False
                self._reason = _UNKNOWN
