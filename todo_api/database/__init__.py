"""Runs the statements of sql/ by their names, through a pool of connections to one PostgreSQL.

This package imports neither Flask nor gunicorn, and does not deal with HTTP. Other packages use only the names in
``__all__``.
"""

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import psycopg

from todo_api.database import statements
from todo_api.database.backup import Contents, program_parameters, restore, snapshot
from todo_api.database.backup import check as check_backup
from todo_api.database.connection import Query, Values, connection_limit, has_session_settings
from todo_api.database.errors import (
    InvalidValueError,
    SilentError,
    UnavailableError,
    first_line,
    is_schema_error,
    translated,
)
from todo_api.database.migrations import apply as apply_migrations
from todo_api.database.migrations import pending as pending_migrations
from todo_api.database.pool import Pool, State
from todo_api.database.role import check as check_role
from todo_api.database.role import ensure as ensure_role
from todo_api.database.role import make as make_role
from todo_api.database.server import server_of
from todo_api.database.statements import SEPARATOR
from todo_api.database.url import asks_for_tls, check_url, libpq_variables, without_secrets

__all__ = [
    "SEPARATOR",
    "Contents",
    "Database",
    "InvalidValueError",
    "SilentError",
    "UnavailableError",
    "apply_migrations",
    "asks_for_tls",
    "check_backup",
    "check_role",
    "check_url",
    "connection_limit",
    "ensure_role",
    "fill_pools",
    "has_session_settings",
    "libpq_variables",
    "make_role",
    "pending_migrations",
    "pool_state",
    "program_parameters",
    "restore",
    "server_of",
    "snapshot",
    "without_secrets",
]

log = logging.getLogger(__name__)

_databases: "WeakSet[Database]" = WeakSet()


class Database:
    """A pool of connections to one PostgreSQL, and the statements of sql/ to run on it."""

    def __init__(
        self,
        get_conninfo: Callable[[], str],
        *,
        pooler: bool,
        role: str,
        get_share: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Load the statements, without connecting to the database.

        ``get_conninfo`` returns the connection string; it is called for each new connection, in a thread of the pool.
        ``get_share`` returns how many connections this process may keep, or None if the server allows one for each
        thread, or is not asked yet.
        ``pooler`` is true if the connection string leads to a pooler in transaction mode, such as PgBouncer.
        ``role`` is the role that statements run as, for which row-level security holds; '' for the login role.

        Raises:
            StatementError: the files in sql/ are invalid.

        """
        self._statements = statements.load()
        self._role = role
        self._missing: dict[str, str] = {}  # statements for which the database lacks something, and what it lacks
        self.pool = Pool(get_conninfo, get_share, pooler=pooler)
        _databases.add(self)

    def fetch_json(self, name: str, **parameters: Any) -> bytes | None:
        """Run a statement and return its row as a JSON object, or None if there is no row.

        Raises:
            UnavailableError: the database cannot run the statement now.
            InvalidValueError: a parameter has a value that no column can hold.

        """
        statement = self._statements[name]
        row = self._fetch(name, statement.row_json, parameters)
        return row[0] if row else None

    def fetch_json_list(self, name: str, **parameters: Any) -> tuple[list[bytes], int]:
        """Run a statement and return its rows as JSON arrays of up to 4000 rows each, and the number of all rows.

        ``SEPARATOR`` separates the elements of an array and occurs nowhere else in it.

        Raises:
            UnavailableError: the database cannot run the statement now.
            InvalidValueError: a parameter has a value that no column can hold.

        """
        statement = self._statements[name]
        values = self._fetch(name, statement.rows_json, parameters) or ()
        return list(values[::2]), sum(map(int, values[1::2]))

    def _fetch(self, name: str, sql: bytes, parameters: dict[str, Any]) -> Values | None:
        query = sql, self._statements[name].values(parameters)
        try:
            row = self.pool.fetch(*self._identity(parameters), query)
        except UnavailableError as error:
            if not self.pool.outage.active:  # an outage is logged once, not for each statement
                log.warning("%s: %s", name, error)
            raise
        except psycopg.Error as error:
            if (known := translated(error)) is error:
                raise  # a bug
            if is_schema_error(error):
                self._record_missing(name, first_line(error))
            else:
                # The error message is not logged, because it may contain data of a user.
                log.warning("%s: %s (SQLSTATE %s)", name, type(error).__name__, error.sqlstate)
            raise known from error
        if self._missing.pop(name, None):
            log.warning("%s: the statement works again", name)
        return row

    def _identity(self, parameters: dict[str, Any]) -> list[Query]:
        """Return the statement that travels in front, so that PostgreSQL shows and changes only this user's rows.

        A call without ``user_id`` has an identity too: nobody's, for whom there are no rows.
        """
        if not self._role:
            return []
        identify = self._statements["database/identify"]
        return [identify.query(role=self._role, user_id=parameters.get("user_id", ""))]

    def _record_missing(self, name: str, reason: str) -> None:
        """Record what the database lacks for a statement, and log each reason once. A reason contains names only."""
        if reason not in self._missing.values():
            log.error(
                "%s: the database lacks an object that the migrations created, or the role may not use it; "
                "statements fail until that is repaired: %s",
                *(name, reason),
            )
        self._missing[name] = reason


def fill_pools(threads: int) -> None:
    """Fill the pool of each Database in this process with a connection for each thread.

    A pool returns early if its server cannot be reached. The other pools are still filled.
    """
    for database in list(_databases):
        database.pool.fill(threads)


def pool_state() -> State:
    """Return the state of the pools in this process, added up."""
    states = [database.pool.state() for database in list(_databases)]
    return State(
        size=sum(state.size for state in states),
        available=sum(state.available for state in states),
        waiting=sum(state.waiting for state in states),
        outage=any(state.outage for state in states),
    )
