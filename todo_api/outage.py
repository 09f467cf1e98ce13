"""Knows whether the database is away, so that nobody waits for it, and logs when that changes."""

import logging
import threading
import time

_QUIET = 5  # seconds; a reason may hold the id of a process, and so be another one each time

_UNKNOWN = "it does not answer"

log = logging.getLogger(__name__)


class Outage(logging.Filter):
    """Whether the database is known to be away, and a line in the log when that changes.

    The pool logs some lines for each attempt to connect. Out of these it takes the reason, and drops them.
    """

    def __init__(self) -> None:
        """Begin without one, and listen to the pool."""
        super().__init__()
        self.known = False
        self._reason = _UNKNOWN
        self._quiet_until = 0.0
        self._lock = threading.Lock()
        logging.getLogger("psycopg.pool").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a failed attempt's reason, and drop the line."""
        for argument in record.args or ():
            if isinstance(argument, Exception):
                self._heed(str(argument).partition("\n")[0])
        return False

    def _heed(self, reason: str) -> None:
        """Keep a reason, and say it where the log has another: then somebody may have to do something."""
        with self._lock:
            if self.known and (reason == self._reason or time.monotonic() < self._quiet_until):
                return
            self._reason = reason
            if self.known:
                self._quiet_until = time.monotonic() + _QUIET
                log.warning("the database still can't be reached: %s", reason)

    def begin(self) -> None:
        """Say that the database is away."""
        with self._lock:
            if not self.known:
                log.warning("requests get a 503 until the database can be reached: %s", self._reason)
                self.known = True
                self._quiet_until = time.monotonic() + _QUIET

    def end(self) -> None:
        """Say that it is back, or has been there all the time."""
        if not self.known:  # as on each request
            return
        with self._lock:
            if self.known:
                log.warning("the database can be reached again")
                self.known = False
                self._reason = _UNKNOWN
