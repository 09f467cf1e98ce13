"""Clears the idempotency keys of users who do not come back, in the background.

sql/database/abandoned_keys.sql says why and when.
"""

import logging
import threading
import time
from collections.abc import Callable

import psycopg

from todo_api.config import StartError
from todo_api.database import statements
from todo_api.database.connection import NetworkConnection
from todo_api.database.errors import UnavailableError, first_line

log = logging.getLogger(__name__)

_PAUSE = 3600  # seconds between two runs in one process
_SHORT_PAUSE = 60  # seconds, if there may be more keys
_MOST_KEYS = 1000  # of one run: the LIMIT in abandoned_keys.sql
_FAILED = "old idempotency keys are not cleared: %s"
_HIDDEN = (
    "row-level security hides them from the role of DATABASE_URL: set MIGRATION_DATABASE_URL to a URL with the role "
    "that owns the tables"
)


class AbandonedKeys:
    """The idempotency keys of users who do not come back."""

    def __init__(self, get_owner: Callable[[], str]) -> None:
        """Run nothing yet. ``get_owner`` returns the connection string of the tables' owner, who sees all keys."""
        self._get_owner = get_owner
        self._next = 0.0  # when the next run is due
        self._running = threading.Lock()

    def clear(self) -> None:
        """Start a run in the background, if one is due. The caller does not wait, and gets no error."""
        if time.monotonic() < self._next or not self._running.acquire(blocking=False):
            return
        self._next = time.monotonic() + _PAUSE
        try:
            threading.Thread(target=self._run, name="abandoned keys", daemon=True).start()
        except RuntimeError as error:  # a limit of threads is reached
            self._running.release()
            log.warning(_FAILED, error)

    def _run(self) -> None:
        try:
            if self._clear() == _MOST_KEYS:
                self._next = time.monotonic() + _SHORT_PAUSE
        except (StartError, UnavailableError, psycopg.Error) as error:
            log.warning(_FAILED, first_line(error))
        finally:
            self._running.release()

    def _clear(self) -> int:
        """Clear the oldest keys, and return how many were found."""
        loaded = statements.load()
        with NetworkConnection.connect(
            self._get_owner(), autocommit=True, client_encoding="UTF8", prepare_threshold=None
        ) as connection:
            owner = psycopg.RawCursor(connection)
            if owner.execute(loaded["database/isolation"].rows).fetchone() != (False,):
                raise StartError(_HIDDEN)
            users = [user_id for (user_id,) in owner.execute(loaded["database/abandoned_keys"].rows).fetchall()]
            for user_id in dict.fromkeys(users):
                owner.execute(loaded["database/clear_abandoned_keys"].rows, [user_id])
            return len(users)
