"""The PostgreSQL that runs in DATA_DIR if there is no DATABASE_URL, as long as a process uses it.

Each process that uses the server holds a shared lock on DATA_DIR/users.lock, and the last one stops the server. So two
services, or a service and ``flask psql``, share one server, and a killed process leaves no lock behind. A server that
has outlived its users is found by connecting to it, and used again.
"""

import atexit
import fcntl
import logging
import os
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

_NAME = "todo"  # of the service's role, and of the database that the role owns
_ANSWER_TIMEOUT = 60  # seconds; a server that recovers from a crash answers that it does, and may take longer
_users: dict[Path, int] = {}  # DATA_DIR -> this process's lock on its users.lock
_known: set[Path] = set()  # each DATA_DIR that this process uses, or the process that it was forked from


def start(data_dir: Path) -> str:
    """Start the server unless it runs, and return its connection string. It stops with the last process that uses it.

    Raises:
        StartError: it cannot be started.

    """
    config.drop_libpq_variables()
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o711 if socket_folder.is_root() else 0o700)
        data_dir = data_dir.resolve()
        cluster = data_dir / "postgres"
        with _locked(data_dir / "start.lock") as lock:
            if data_dir not in _users and data_dir not in _known:  # a forked process ends before its parent
                _users[data_dir] = _lock(data_dir / "users.lock", fcntl.LOCK_SH)
                atexit.register(_leave, data_dir)
            if cluster.exists():
                conninfo = _running(cluster) or _launch(cluster)
            else:
                clusters.create(cluster, lock)
                conninfo = _launch(cluster)
            _ensure_database(conninfo)
    except (OSError, UnicodeError) as error:
        raise StartError(f"DATA_DIR {data_dir}: {error}") from error
    if data_dir not in _known:
        log.info("to use PostgreSQL with psql: %s", shlex.join([psql(), conninfo]))
        _known.add(data_dir)
    return conninfo


def psql() -> str:
    """Return the path of psql: the installed one, or else the bundled one.

    Raises:
        StartError: there is neither.

    """
    return shutil.which("psql") or str(clusters.bin_folder() / "psql")


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Let one process at a time start or stop the server; yields the lock's file descriptor."""
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
    """Stop the server if no other process uses it."""
    if data_dir not in _users:
        return  # this process was forked from the one that started the server
    # A second Ctrl-C, or gunicorn's next signal to a worker, would interrupt this.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
    # If the folder was deleted meanwhile, no other process can use it.
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
    """Return the connection string of the server if it runs, after waiting until it has started.

    Raises:
        StartError: it runs, but does not answer.

    """
    deadline = time.monotonic() + _ANSWER_TIMEOUT
    while True:
        postmasters = clusters.postmasters(cluster)
        # Without its process, postmaster.pid may name the socket of another server, such as the one whose folder was
        # copied. The cluster's own socket is asked even then: the server may run in another container.
        conninfo = _conninfo((postmasters and socket_folder.recorded(cluster)) or cluster)
        match _ping(conninfo):
            case Ping.OK:
                return conninfo
            case Ping.REJECT:
                pass  # it recovers or shuts down
            case _ if not postmasters:
                return None
            case _ if time.monotonic() > deadline:
                raise StartError(f"a PostgreSQL (process {postmasters[0].pid}) runs in {cluster} but does not answer")
        time.sleep(0.02)


def _launch(cluster: Path) -> str:
    """Start the server and return its connection string.

    Raises:
        StartError: it has ended, with the last error in its log.

    """
    folder = socket_folder.choose(cluster)
    conninfo = _conninfo(folder)
    server = clusters.launch(cluster, folder)
    try:
        _wait_for_answer(server, conninfo, cluster)
    except BaseException:
        # If the service has to stop just now, the server may not have its working directory yet, by which it is found.
        server.send_signal(signal.SIGINT)
        server.wait()
        raise
    return conninfo


def _wait_for_answer(server: subprocess.Popen[bytes], conninfo: str, cluster: Path) -> None:
    deadline = time.monotonic() + _ANSWER_TIMEOUT
    while (state := _ping(conninfo)) != Ping.OK:
        if server.poll() is not None or (state != Ping.REJECT and time.monotonic() > deadline):
            raise StartError(f"PostgreSQL did not start: {clusters.last_error(cluster)}")
        time.sleep(0.02)


def _conninfo(folder: Path) -> str:
    return make_conninfo("", host=str(folder), port=socket_folder.PORT, dbname=_NAME, user=_NAME)


def _ping(conninfo: str) -> Ping:
    return Ping(clusters.ping(conninfo))


def _ensure_database(conninfo: str) -> None:
    """Create the service's role, which is no superuser, and its database, unless an earlier start did."""
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        log.info("creating the role and the database %s", _NAME)
        server = [f"--host={conninfo_to_dict(conninfo)['host']}", f"--port={socket_folder.PORT}", "--username=postgres"]
        # The role exists already if an earlier start was killed between these two.
        clusters.run("createuser", *server, _NAME, may_fail=True)
        clusters.run("createdb", *server, f"--owner={_NAME}", _NAME)
