"""What can go wrong with a statement, as other packages see it."""

import psycopg


class DatabaseError(Exception):
    """A statement could not be run."""


class UnavailableError(DatabaseError):
    """The database cannot run the statement now. The same call may succeed later."""


class InvalidValueError(DatabaseError):
    """A parameter has a value that no column can hold."""


# From psycopg's errors to the ones above; the first match counts. Any other error is a bug and stays as it is.
_TRANSLATIONS: list[tuple[type[psycopg.Error], type[DatabaseError]]] = [
    (psycopg.OperationalError, UnavailableError),  # down, restarting, out of connections, timed out, deadlocks
    (psycopg.errors.ReadOnlySqlTransaction, UnavailableError),  # 25006: a standby, during a failover
    (psycopg.DataError, InvalidValueError),  # class 22
]


def translated(error: psycopg.Error) -> Exception:
    """Return the error that other packages see for an error of psycopg's."""
    for raised, translation in _TRANSLATIONS:
        if isinstance(error, raised):
            return translation(str(error))
    return error
