"""What has to be so before the first statement: a PostgreSQL that runs, with its migrations applied."""

import logging
import threading

from todo_api import config, database, database_url, embedded, migrations
from todo_api.config import Settings

log = logging.getLogger(__name__)
_lock = threading.Lock()
_migrated: set[str] = set()
_away = threading.Event()  # the database was, when this process or the one that it was forked from started


def prepare(settings: Settings) -> str:
    """Make the database ready and give its connection string; migrations are looked at once in a process and its forks.

    The pool calls this for each connection, so that an embedded server that was killed is started again.

    Raises:
        StartError: it can't be made ready: a person has to do something.
        database.Unavailable: it can't be reached now: try again later.

    """
    with _lock:
        conninfo = find(settings)
        if conninfo not in _migrated:
            if settings.migration_database_url:
                database_url.check("MIGRATION_DATABASE_URL", settings.migration_database_url)
            if settings.database_url and not settings.database_pooler:
                database.check_session(conninfo)
            migrations.apply(settings.migration_database_url or conninfo)
            _migrated.add(conninfo)
        return conninfo


def find(settings: Settings) -> str:
    """Give the connection string of the service's database; the embedded one is started if it is not running.

    Raises:
        StartError: there is none to give.

    """
    if not settings.database_url:
        return embedded.start(settings.data_dir)
    database_url.check("DATABASE_URL", settings.database_url)
    return settings.database_url


def prepare_or_fail(settings: Settings) -> None:
    """Make the database ready at the start; one that can't be reached is waited for while the service answers 503."""
    if _away.is_set():
        return  # gunicorn's master has found out, and said so: its workers need not wait for it again
    try:
        prepare(settings)
    except config.StartError as error:
        config.fail(error)
    except database.Unavailable as error:
        _away.set()
        log.warning("the database can't be reached yet: %s", str(error).partition("\n")[0])
