"""Whether the database can be reached, and a line in the log when that changes."""

import logging
import threading
import time

_QUIET = 5  # seconds between two lines about a new reason: some reasons contain a process id and are always new
_UNKNOWN = "it does not answer"

log = logging.getLogger(__name__)


class Outage:
    """The time in which a database cannot be reached. Requests are answered with a 503 meanwhile, at once."""

    def __init__(self) -> None:
        """Begin without an outage."""
        self.active = False
        self._reason = _UNKNOWN
        self._quiet_until = 0.0
        self._lock = threading.Lock()

    def failed(self, error: Exception) -> None:
        """Note why an attempt to connect failed, and log the reason if it has changed during an outage."""
        reason = str(error).partition("\n")[0]
        with self._lock:
            if self.active and (reason == self._reason or time.monotonic() < self._quiet_until):
                return
            self._reason = reason
            if self.active:
                self._quiet_until = time.monotonic() + _QUIET
                log.warning("the database still cannot be reached: %s", reason)

    def begin(self) -> None:
        """Log that the database cannot be reached, unless that is known."""
        with self._lock:
            if not self.active:
                log.warning("requests get a 503 until the database can be reached: %s", self._reason)
                self.active = True
                self._quiet_until = time.monotonic() + _QUIET

    def end(self) -> None:
        """Log that the database can be reached again, if it could not."""
        if not self.active:  # the usual case, without the lock
            return
        with self._lock:
            if self.active:
                log.warning("the database can be reached again")
                self.active = False
                self._reason = _UNKNOWN
