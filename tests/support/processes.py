"""Processes and ports, and how to wait for them."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

START_TIMEOUT = 60  # seconds; far more than a start takes, so that a busy machine fails no test


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def wait_until(what: Callable[[], bool], *, timeout: float = START_TIMEOUT) -> None:
    """Wait until something holds, and fail if it never does."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def servers_in(folder: Path) -> list[psutil.Process]:
    """Find the PostgreSQL processes that run on a cluster in a folder."""
    return [
        process
        for process in psutil.process_iter(["name", "cwd", "ppid"])
        if process.info["name"] == "postgres" and Path(process.info["cwd"] or "/").is_relative_to(folder.resolve())
    ]


def postmaster_in(folder: Path) -> psutil.Process:
    """Find the PostgreSQL process that is the parent of the others."""
    servers = servers_in(folder)
    # What was seen, since some may be gone by now: a server ends processes of its own.
    [first] = [server for server in servers if server.info["ppid"] not in {other.pid for other in servers}]
    return first
