"""Processes and ports, and how to wait for them."""

import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

START_TIMEOUT = 180  # seconds; far more than a start takes, so that a busy machine fails no test
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_BLOCK = 100  # ports
_claims: list[socket.socket] = []


def free_port() -> int:
    """Find a port that nobody listens on, and that nobody gets before the caller has bound it."""
    return next(_ports)


def _unclaimed_ports() -> Iterator[int]:
    """Give ports, each once, which neither the kernel nor another process of the tests has for anybody.

    The kernel takes one from its range for each connection that is made, of a crowd's clients for instance; these are
    below that. A process claims them in blocks, by a name that goes with it, whatever becomes of it.
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
            with suppress(OSError):  # a stranger listens there
                socket.create_server(("127.0.0.1", port)).close()
                yield port
    while True:  # all are claimed, or this kernel's range leaves none
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        yield port


_ports = _unclaimed_ports()


def wait_until(what: Callable[[], bool], *, timeout: float = START_TIMEOUT) -> None:
    """Wait until something holds, and fail if it never does."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def children(pid: int, *, recursive: bool = False) -> dict[psutil.Process, str]:
    """Find the children of a process that have not ended, and their names; any of them may end meanwhile."""
    found = {}
    with suppress(psutil.NoSuchProcess):  # the process itself
        for child in psutil.Process(pid).children(recursive=recursive):
            with suppress(psutil.NoSuchProcess):
                seen = child.as_dict(["name", "status"])
                if seen["status"] != psutil.STATUS_ZOMBIE:
                    found[child] = str(seen["name"])
    return found


def servers_in(folder: Path, *attributes: str) -> list[psutil.Process]:
    """Find the PostgreSQL processes that run on a cluster in a folder, with what was seen of them as ``info``.

    Only that is safe to look at: a server ends processes of its own.
    """
    return [
        process
        for process in psutil.process_iter(["name", "cwd", "ppid", *attributes])
        if process.info["name"] == "postgres" and Path(process.info["cwd"] or "/").is_relative_to(folder.resolve())
    ]


def postmasters_in(folder: Path) -> list[psutil.Process]:
    """Find those PostgreSQL processes that are no other one's child; orphans of one that was killed, too."""
    servers = servers_in(folder)
    return [server for server in servers if server.info["ppid"] not in {other.pid for other in servers}]


def postmaster_in(folder: Path) -> psutil.Process:
    """Find the PostgreSQL process that is the parent of the others, once there are no others beside its own."""
    found: list[psutil.Process] = []

    def is_alone() -> bool:
        found[:] = postmasters_in(folder)
        return len(found) == 1

    wait_until(is_alone)
    return found[0]
