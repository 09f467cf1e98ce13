"""The errors of a statement that other packages can handle."""

import psycopg


class UnavailableError(Exception):
    """The database cannot run the statement now. A retry may succeed later."""


class SilentError(UnavailableError):
    """The database did not respond in time. It may be waking up."""


class InvalidValueError(Exception):
    """A parameter has a value that no column can hold."""


# The database lacks an object that the migrations created, or the role may not use it. That happens if somebody drops,
# renames or restores tables while the service runs.
_SCHEMA_ERRORS = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.UndefinedObject,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.InvalidParameterValue,  # 22023: the role of DATABASE_ROLE was dropped
)
# Maps psycopg's errors to the errors above. The first match counts. Any other error is a bug and is not translated.
_TRANSLATIONS: list[tuple[type[psycopg.Error], type[UnavailableError | InvalidValueError]]] = [
    (psycopg.OperationalError, UnavailableError),  # down, restarting, out of connections, timed out, deadlocks
    (psycopg.errors.ReadOnlySqlTransaction, UnavailableError),  # 25006: a standby, during a failover
    *((error, UnavailableError) for error in _SCHEMA_ERRORS),
    (psycopg.DataError, InvalidValueError),  # class 22
]


def first_line(error: Exception) -> str:
    """Return the message of an error without its details, which can contain data."""
    return str(error).partition("\n")[0]


def unreachable(error: psycopg.Error) -> UnavailableError:
    """Return the error for other packages that tells why the database cannot be reached."""
    kind = SilentError if isinstance(error, psycopg.errors.ConnectionTimeout) else UnavailableError
    return kind(str(error))


def translated(error: psycopg.Error) -> Exception:
    """Return the error that replaces psycopg's error for other packages, or the same error if it is a bug."""
    for raised, translation in _TRANSLATIONS:
        if isinstance(error, raised):
            return translation(str(error))
    return error


def is_schema_error(error: psycopg.Error) -> bool:
    """Return whether the database lacks an object that the migrations created, or the role may not use it."""
    return isinstance(error, _SCHEMA_ERRORS)
