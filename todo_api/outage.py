"""Knows whether the database is away, so that nobody waits for it, and logs when that changes."""

import logging
import threading

log = logging.getLogger(__name__)


class Outage(logging.Filter):
    """Whether the database is known to be away, and a line in the log when that changes.

    The pool logs some lines for each attempt to connect. Out of these it takes the reason, and drops them.
    """

    def __init__(self) -> None:
        """Begin without one, and listen to the pool."""
        super().__init__()
        self.known = False
        self._reason = "it does not answer"
        self._lock = threading.Lock()
        logging.getLogger("psycopg.pool").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a failed attempt's reason, and drop the line."""
        for argument in record.args or ():
            if isinstance(argument, Exception):
                self._reason = str(argument).partition("\n")[0]
        return False

    def begin(self) -> None:
        """Say that the database is away."""
        with self._lock:
            if not self.known:
                log.warning("requests get a 503 until the database can be reached: %s", self._reason)
                self.known = True

    def end(self) -> None:
        """Say that it is back, or has been there all the time."""
        if not self.known:  # as on each request
            return
        with self._lock:
            if self.known:
                log.warning("the database can be reached again")
                self.known = False
