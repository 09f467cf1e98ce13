"""The errors of a statement that other packages can handle."""

import psycopg


class UnavailableError(Exception):
    """The database cannot run the statement now. A retry may succeed later."""


class InvalidValueError(Exception):
    """A parameter has a value that no column can hold."""


# Maps psycopg's errors to the errors above. The first match counts. Any other error is a bug and is not translated.
_TRANSLATIONS: list[tuple[type[psycopg.Error], type[UnavailableError | InvalidValueError]]] = [
    (psycopg.OperationalError, UnavailableError),  # down, restarting, out of connections, timed out, deadlocks
    (psycopg.errors.ReadOnlySqlTransaction, UnavailableError),  # 25006: a standby, during a failover
    (psycopg.DataError, InvalidValueError),  # class 22
]


def translated(error: psycopg.Error) -> Exception:
    """Return the error that replaces an error of psycopg's for other packages, or the same error if none does."""
    for raised, translation in _TRANSLATIONS:
        if isinstance(error, raised):
            return translation(str(error))
    return error
