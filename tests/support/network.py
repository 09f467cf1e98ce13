"""A network of a test's own, on which nothing but a service and its PostgreSQL talk, and which can be frozen.

It is a network namespace. Who is not root gets it within a user namespace, where the kernel lets everybody have one.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.support.databases import as_url
from tests.support.optional_tools import missing, program
from tests.support.postgres import Postgres
from tests.support.processes import free_port, wait_until
from tests.support.service import Service

_ROOT = os.geteuid() == 0
# PostgreSQL refuses to run as root, even as one who is root in a user namespace only.
_NOT_AS_ROOT = [] if _ROOT else ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
# Nothing is refused and nothing is answered: packets are lost on arrival, and those who sent them are not told.
_FROZEN = "add table inet frozen; add chain inet frozen input { type filter hook input priority 0; %s }"
# The service's clients are outside: it inherits a socket that listens there.
_LISTEN = (
    "import os, socket, sys; listener = socket.create_server(('127.0.0.1', int(sys.argv[1])), backlog=100);"
    "listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1);"
    "os.dup2(listener.fileno(), 9); os.execvp(sys.argv[2], sys.argv[2:])"
)


class Network:
    """A network namespace with nothing but a loopback interface."""

    def __init__(self) -> None:
        """Make it; it lasts as long as a process in it."""
        for name in ("ip", "nft", "nsenter", "unshare"):
            program(name)
        self.holder = subprocess.Popen(
            ["unshare", "--net", *([] if _ROOT else ["--map-root-user"]), "sh", "-c", "ip link set lo up && exec cat"],
            stdin=subprocess.PIPE,  # cat ends with it, so with the tests, whatever becomes of them
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self.holder.stdin
        assert self.holder.stdout
        try:
            self.holder.stdin.write(b"ready\n")
            ready = self.holder.stdout.readline()
        except BrokenPipeError:
            ready = b""
        if not ready:
            missing(f"no network namespace can be had: {self.holder.communicate()[1].decode()}")
        users = [] if _ROOT else ["--user", "--preserve-credentials"]
        self._enter = ["nsenter", f"--target={self.holder.pid}", "--net", *users]
        self.inside = [*self._enter, *_NOT_AS_ROOT]

    def freeze(self) -> None:
        """Lose every packet from now on."""
        self._lose("policy drop;")

    def forget(self, ports: Iterable[int]) -> None:
        """Lose the packets of those who have one of these ports, as a firewall does that has forgotten a connection."""
        named = ", ".join(map(str, ports))
        self._lose(f"tcp sport {{ {named} }} drop; tcp dport {{ {named} }} drop;")

    def _lose(self, rules: str) -> None:
        subprocess.run([*self._enter, "nft", _FROZEN % rules], check=True)

    def thaw(self) -> None:
        """Lose no packets any more."""
        subprocess.run([*self._enter, "nft", "delete table inet frozen"], check=True)

    def end(self) -> None:
        """Let go of it."""
        self.holder.communicate()


class NetworkPostgres(Postgres):
    """A PostgreSQL in a network of a test's own; from outside it is reached through its socket, frozen or not."""

    url = as_url("host=127.0.0.1 port=5432 user=postgres dbname=postgres")

    def __init__(self, folder: Path, network: Network) -> None:
        """Make it and start it."""
        self.network = network
        super().__init__(folder)

    def start(self) -> None:
        """Start it, once more than others, since how that is done is nobody else's business."""
        super().start()
        command = self.process.args
        assert isinstance(command, list)
        self.stop()
        self.process = subprocess.Popen(
            [*self.network.inside, *command, "--listen-addresses=127.0.0.1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self.answers)


class NetworkService(Service):
    """A service in a network of a test's own, with its clients outside."""

    def __init__(self, log: Path, postgres: NetworkPostgres) -> None:
        """Start it, with one worker."""
        port = free_port()
        super().__init__(
            log,
            [sys.executable, "wsgi.py", "--bind", "fd://9"],
            prefix=[sys.executable, "-c", _LISTEN, str(port), *postgres.network.inside],
            PORT=port,
            DATABASE_URL=postgres.url,
            WEB_CONCURRENCY=1,
        )
