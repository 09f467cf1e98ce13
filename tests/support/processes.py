"""Processes, free ports, and waiting for conditions."""

import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.capabilities import root_lacks

START_TIMEOUT = 180  # seconds; far more than a start takes, even on a busy machine
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_BLOCK = 100  # ports
_claims: list[socket.socket] = []


def free_port() -> int:
    """Return a port that no other program uses, until the caller binds it."""
    return next(_ports)


def _unclaimed_ports() -> Iterator[int]:
    """Yield ports, each once, that neither the kernel nor another process of the tests gives to anyone else.

    The kernel takes the client's port of each connection from its own range, so the ports are below that range. A
    process claims ports in blocks. A claim is a socket with a name, which ends with the process even if it is killed.
    """
    firsts = range(10_000, int(_PORT_RANGE.read_text(encoding="ascii").split()[0]) - _BLOCK, _BLOCK)
    for first in random.sample(firsts, len(firsts)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0todo_api's tests have the ports from {first}")
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        for port in range(first, first + _BLOCK):
            with suppress(OSError):  # another program listens there
                socket.create_server(("127.0.0.1", port)).close()
                yield port
    while True:  # all blocks are claimed, or the kernel's range leaves no ports below it
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        yield port


_ports = _unclaimed_ports()


def wait_until(what: Callable[[], bool], *, timeout: float = START_TIMEOUT) -> None:
    """Wait until a condition is true, and fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def children(pid: int, *, recursive: bool = False) -> dict[psutil.Process, str]:
    """Return the running children of a process and their names. Children that end meanwhile are left out."""
    found = {}
    with suppress(psutil.NoSuchProcess):  # the process itself
        for child in psutil.Process(pid).children(recursive=recursive):
            with suppress(psutil.NoSuchProcess):
                seen = child.as_dict(["name", "status"])
                if seen["status"] != psutil.STATUS_ZOMBIE:
                    found[child] = str(seen["name"])
    return found


def send(signal_number: int, *processes: psutil.Process) -> None:
    """Send a signal to processes, in this order. Those that have ended meanwhile are left out."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal_number)


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended. Its parent may not have reaped it yet."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def servers_in(folder: Path, *attributes: str) -> list[psutil.Process]:
    """Return the PostgreSQL processes of a cluster in a folder.

    Their attributes are in ``info``. To read them from the process is not safe, since the process may have ended.
    """
    return [
        process
        for process in psutil.process_iter(["name", "cwd", "ppid", *attributes])
        if process.info["name"] == "postgres" and _folder_of(process).is_relative_to(folder.resolve())
    ]


def _folder_of(process: psutil.Process) -> Path:
    """Return the working directory of a process that was listed with it, or / if the process has ended.

    Root in a container may not see it. The user of the process may.
    """
    folder: str = process.info["cwd"] or ""
    if not folder and root_lacks("sys_ptrace"):
        with suppress(psutil.NoSuchProcess):
            user, group = process.uids().real, process.gids().real
            command = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
            command += ["readlink", f"/proc/{process.pid}/cwd"]
            folder = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return Path(folder or "/")


def postmasters_in(folder: Path) -> list[psutil.Process]:
    """Return the PostgreSQL processes without a parent among them: postmasters, and orphans of a killed one."""
    servers = servers_in(folder)
    return [server for server in servers if server.info["ppid"] not in {other.pid for other in servers}]


def postmaster_in(folder: Path) -> psutil.Process:
    """Wait until a cluster has one postmaster and no orphans, and return the postmaster."""
    found: list[psutil.Process] = []

    def is_alone() -> bool:
        found[:] = postmasters_in(folder)
        return len(found) == 1

    wait_until(is_alone)
    return found[0]
