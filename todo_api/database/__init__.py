"""The statements of sql/, run by their names through a pool of connections to one PostgreSQL.

This package knows no Flask, no gunicorn and no HTTP. The other packages use the names below, and nothing else of it.
"""

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import psycopg

from todo_api.database import statements
from todo_api.database.connection import has_session_settings
from todo_api.database.errors import DatabaseError, InvalidValueError, UnavailableError, translated
from todo_api.database.migrations import apply as apply_migrations
from todo_api.database.pool import Pool
from todo_api.database.statements import SEPARATOR
from todo_api.database.url import check_url, libpq_variables

__all__ = [
    "SEPARATOR",
    "Database",
    "DatabaseError",
    "InvalidValueError",
    "UnavailableError",
    "apply_migrations",
    "check_url",
    "connect_all",
    "has_session_settings",
    "libpq_variables",
]

log = logging.getLogger(__name__)

_databases: "WeakSet[Database]" = WeakSet()


class Database:
    """One PostgreSQL, and the statements of sql/ that can be run on it."""

    def __init__(self, conninfo: Callable[[], str], *, connections: int, pooler: bool) -> None:
        """Create it without connecting.

        ``conninfo`` is called for each new connection, in a thread of the pool. ``pooler`` tells that a pooler in
        transaction mode, such as PgBouncer, is in between.
        """
        self._statements = statements.load()
        self.pool = Pool(conninfo, connections, pooler=pooler)
        _databases.add(self)

    def fetch_json(self, name: str, **parameters: Any) -> bytes | None:
        """Run a statement and return its row as a JSON object, or None if there is no row.

        Raises:
            UnavailableError: the database cannot run the statement now.
            InvalidValueError: a parameter has a value that no column can hold.

        """
        statement = self._statements[name]
        row = self._fetch(name, statement.row_json, statement.values(parameters))
        return row[0] if row else None

    def fetch_json_list(self, name: str, **parameters: Any) -> tuple[bytes, int]:
        """Run a statement and return its rows as a JSON array, and their number.

        ``SEPARATOR`` stands between the elements of the array, and nowhere else in it.

        Raises:
            UnavailableError: the database cannot run the statement now.
            InvalidValueError: a parameter has a value that no column can hold.

        """
        statement = self._statements[name]
        row = self._fetch(name, statement.rows_json, statement.values(parameters))
        return (row[0], int(row[1])) if row else (b"[]", 0)

    def _fetch(self, name: str, sql: bytes, values: list[bytes]) -> tuple[bytes, ...] | None:
        try:
            return self.pool.fetch(sql, values)
        except psycopg.Error as error:
            if (known := translated(error)) is error:
                raise  # a bug
            # The message is not logged: it may contain what a user has stored.
            log.warning("%s: %s (SQLSTATE %s)", name, type(error).__name__, error.sqlstate)
            raise known from error


def connect_all() -> None:
    """Fill the pool of every Database of this process, or return early if its server cannot be reached."""
    for database in list(_databases):
        database.pool.fill()
