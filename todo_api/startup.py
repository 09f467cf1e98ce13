"""Prepares the settings and the database for the first request: a running PostgreSQL with its migrations applied."""

import atexit
import fcntl
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from todo_api import config, database, embedded, logs, tokens
from todo_api.config import Settings, StartError
from todo_api.embedded import stop_signals

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Seconds for which flask migrate repeats an attempt to connect that times out. A start does not repeat it.
# _CONNECT_TIMEOUTS in database/connection.py limits each attempt.
_MIGRATE_TIMEOUT = 30

# If a worker exits with this status, gunicorn's master exits too, instead of starting workers forever.
_FAILED = 3

STOP_SIGNALS = stop_signals.SIGNALS

_locks: dict[str, threading.Lock] = {}  # by DATABASE_URL or DATA_DIR: a database that hangs does not delay others
# A forked process inherits these. So gunicorn's workers know what the master has done.
# By the connection strings of databases whose migrations are applied: the connection strings for the pool.
_prepared: dict[str, str] = {}
_shares: dict[str, int] = {}  # by DATABASE_URL, if its server allows too few connections: a worker's share of them
_unreachable: set[str] = set()  # each DATABASE_URL whose database could not be reached at the start
# Each AUTH_JWKS that was checked at the start: a file that is replaced later stops no worker.
_checked: set[str] = set()
_signals: list[int] = []  # those to stop that have arrived


def fail(reason: object, status: int = _FAILED) -> NoReturn:
    """End the process with one line on standard error; line breaks in the reason become spaces."""
    sys.stderr.write(f"todo_api: {' '.join(str(reason).split())}\n")
    raise SystemExit(status)


def exit_on(*numbers: int, status: Callable[[int], int] = lambda _: 0) -> None:
    """End the process at the first of some signals. An exit stops an embedded server.

    Later ones are ignored, because their exceptions would interrupt the exit. SIGHUP stays ignored under nohup.
    """

    def end(number: int, _frame: object) -> None:
        is_first = not _signals  # first of all, because another signal may interrupt this function
        _signals.append(number)
        if is_first:
            sys.exit(status(number))

    atexit.register(stop_signals.ignore)  # Python removes the handlers before the process has ended

    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def load_settings(status: int = _FAILED) -> Settings:
    """Return the settings, or end the process with a status if they cannot be read or one of them is invalid."""
    _open_standard_streams()
    try:
        Path.cwd()
    except FileNotFoundError:
        os.chdir(config.ROOT)  # gunicorn does so later, but needs a folder until then
    try:
        settings = config.load()
        if settings.auth_jwks not in _checked:
            tokens.check_key_file(settings)
            _checked.add(settings.auth_jwks)
        _ensure_temporary_folder(settings)
    except StartError as error:
        if config.wants_json_logs():
            logs.use_json()
        fail(error, status)
    return settings


def _open_standard_streams() -> None:
    """Open /dev/null for each closed standard stream. Otherwise a lock or a socket would get its file descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
            fcntl.fcntl(null, fcntl.F_SETFD, 0)  # psql inherits it


def _ensure_temporary_folder(settings: Settings) -> None:
    """Use a folder in DATA_DIR if no temporary folder is writable, as on a read-only system: gunicorn needs one."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        if settings.database_url:
            raise StartError("no temporary folder is writable: set TMPDIR to a writable folder") from error
        tempfile.tempdir = str(embedded.temporary_folder(settings.data_dir))


def ensure_server(settings: Settings) -> str:
    """Return the connection string of the service's database, and start the embedded server if it is not running.

    Raises:
        StartError: DATABASE_URL is invalid, or the embedded server cannot be started.

    """
    if not settings.database_url:
        connections = _most_connections(settings)
        return embedded.start(settings.data_dir, settings.postgres_bin, connections, settings.database_role)
    database.check_url("DATABASE_URL", settings.database_url)
    return settings.database_url


def owner_url(settings: Settings, conninfo: str) -> str:
    """Return the connection string of the role that owns the tables. ``conninfo`` is that of the service.

    Raises:
        StartError: MIGRATION_DATABASE_URL is invalid.

    """
    if settings.migration_database_url:
        database.check_url("MIGRATION_DATABASE_URL", settings.migration_database_url)
    return settings.migration_database_url or conninfo


def prepare(settings: Settings) -> str:
    """Start and migrate the database if necessary, and return its connection string.

    A process applies the migrations once, and processes that it forks later do not repeat them. The pool calls this
    function for each new connection. So an embedded server that was killed is started again.

    Raises:
        StartError: the database cannot be prepared until a person changes something.
        UnavailableError: the database cannot be reached now.

    """
    with _locks.setdefault(settings.database_url or str(settings.data_dir), threading.Lock()):
        conninfo = ensure_server(settings)
        if conninfo not in _prepared:
            owner = owner_url(settings, conninfo)
            check_session_settings(settings)
            role, pooler = settings.database_role, settings.database_pooler
            suited = database.suited_to_citus(conninfo, role=role, pooler=pooler)
            database.make_role(conninfo, role, pooler=pooler, owner=owner)
            database.apply_migrations(owner)
            database.ensure_role(conninfo, role, pooler=pooler, owner=owner)
            if not settings.database_pooler:
                _check_connection_limit(settings, conninfo)
            if not settings.database_url:
                command = shlex.join([embedded.psql(settings.postgres_bin), conninfo])
                log.info("to use PostgreSQL with psql: %s", command)
            _prepared[conninfo] = suited
        return _prepared[conninfo]


def check_session_settings(settings: Settings) -> None:
    """Check that DATABASE_URL leads to no pooler in transaction mode, unless DATABASE_POOLER says so.

    Raises:
        StartError: it does.
        UnavailableError: the database cannot be reached.

    """
    if not settings.database_url or settings.database_pooler:
        return
    if not database.has_session_settings(settings.database_url):
        raise StartError(
            "DATABASE_URL leads to a pooler that ignores or rejects session settings: set DATABASE_POOLER=true"
        )


def _most_connections(settings: Settings) -> int:
    """Return how many connections the embedded server must allow."""
    # During a reload, new workers run beside the old ones. Each worker may open one more connection, to ask whether a
    # silent server responds. The remaining 20 are for psql.
    return 2 * settings.web_concurrency * (settings.web_threads + 1) + 20


def needed_connections(settings: Settings) -> int:
    """Return how many connections the service keeps, one for each thread of each worker."""
    return settings.web_concurrency * settings.web_threads


def _check_connection_limit(settings: Settings, conninfo: str) -> None:
    """Log a warning if the service may need more connections than the server allows, and share them out."""
    needed = needed_connections(settings)
    if needed > (limit := database.connection_limit(conninfo)):
        log.warning(
            "%d workers with %d threads each need %d database connections, but the server allows %d: "
            "lower WEB_CONCURRENCY or WEB_THREADS, or raise the server's limit",
            *(settings.web_concurrency, settings.web_threads, needed, limit),
        )
        _shares[settings.database_url] = max(limit // settings.web_concurrency, 1)


def connection_share(settings: Settings) -> int | None:
    """Return how many connections a worker may keep, or None if the server allows one for each thread.

    Without this limit, some workers would keep all connections, and others would have none.
    """
    return _shares.get(settings.database_url)


def patiently(call: Callable[[], Result]) -> Result:
    """Return the result of a call that connects to the database.

    If the database does not respond, keep trying for half a minute: a hosted one may have to wake up.

    Raises:
        SilentError: the database does not respond.

    """
    deadline = time.monotonic() + _MIGRATE_TIMEOUT
    while True:
        try:
            return call()
        except database.SilentError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("the database does not respond yet: %s", _first_line(error))


def prepare_patiently(settings: Settings) -> str:
    """Prepare the database as ``prepare`` does, patiently."""
    return patiently(lambda: prepare(settings))


def prepare_or_fail(settings: Settings) -> None:
    """Prepare the database, or end the process if a person has to change something.

    If the database cannot be reached now, log that and return: the pool prepares it later. Processes that are forked
    after that return at once.
    """
    is_unhandled = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # another server, or gunicorn with --preload
    if not settings.database_url and is_unhandled and threading.current_thread() is threading.main_thread():
        # They would leave PostgreSQL running. SIGINT does not, because Python raises KeyboardInterrupt.
        exit_on(signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)
    if settings.database_url in _unreachable:
        return  # gunicorn's master has waited and has logged it; its workers need not wait again
    try:
        prepare(settings)
    except StartError as error:
        fail(error)
    except database.UnavailableError as error:
        _unreachable.add(settings.database_url)
        log.warning("the database cannot be reached yet: %s", _first_line(error))
    if _signals:  # the exception was raised in a callback, such as __del__, where Python ignores it
        sys.exit(0)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
