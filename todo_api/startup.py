"""What has to be there before the first request: valid settings, and a PostgreSQL that runs and is migrated."""

import logging
import sys
import threading
from typing import NoReturn

from todo_api import config, database, embedded
from todo_api.config import Settings, StartError

log = logging.getLogger(__name__)

_lock = threading.Lock()
# A process knows this of itself and of the process that it was forked from.
_migrated: set[str] = set()  # connection strings
_unreachable: set[Settings] = set()


def fail(reason: object) -> NoReturn:
    """End the process with one line on standard error."""
    sys.stderr.write(f"todo_api: {' '.join(str(reason).split())}\n")
    # With this status of a worker, gunicorn's master ends too, instead of starting workers for ever.
    raise SystemExit(3)


def load_settings() -> Settings:
    """Return the settings, or end the process if one of them is invalid."""
    try:
        return config.load()
    except StartError as error:
        fail(error)


def find(settings: Settings) -> str:
    """Return the connection string of the service's database; start the embedded one if it does not run.

    Raises:
        StartError: there is no such database.

    """
    if not settings.database_url:
        return embedded.start(settings.data_dir)
    database.check_url("DATABASE_URL", settings.database_url)
    return settings.database_url


def prepare(settings: Settings) -> str:
    """Make the database ready and return its connection string; a process and its forks apply migrations once.

    The pool calls this for each connection, so that an embedded server that was killed is started again.

    Raises:
        StartError: it cannot be made ready, and a person has to do something.
        UnavailableError: it cannot be reached now.

    """
    with _lock:
        conninfo = find(settings)
        if conninfo not in _migrated:
            if settings.migration_database_url:
                database.check_url("MIGRATION_DATABASE_URL", settings.migration_database_url)
            if settings.database_url and not settings.database_pooler:
                _check_session(conninfo)
            database.apply_migrations(settings.migration_database_url or conninfo)
            _migrated.add(conninfo)
        return conninfo


def _check_session(conninfo: str) -> None:
    if not database.has_session_settings(conninfo):
        raise StartError("DATABASE_URL leads to a pooler that accepts no session settings: set DATABASE_POOLER=true")


def prepare_or_fail(settings: Settings) -> None:
    """Make the database ready, or end the process; if it only cannot be reached, log that."""
    if settings in _unreachable:
        return  # gunicorn's master has tried and logged it; its workers do not wait for it again
    try:
        prepare(settings)
    except StartError as error:
        fail(error)
    except database.UnavailableError as error:
        _unreachable.add(settings)
        log.warning("the database cannot be reached yet: %s", str(error).partition("\n")[0])
