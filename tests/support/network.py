"""A network between a service and its PostgreSQL, which a test can freeze.

It is a network namespace. Without root, it is created in a user namespace, if the kernel allows that.
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
# PostgreSQL does not run as root, even if it is root only in a user namespace.
_NOT_AS_ROOT = [] if _ROOT else ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
# The rules drop packets on arrival. The sender gets neither a response nor an error.
_FROZEN = "add table inet frozen; add chain inet frozen input { type filter hook input priority 0; %s }"
# The service's clients are outside the network, so the service inherits a listening socket from there.
_LISTEN = (
    "import os, socket, sys; listener = socket.create_server(('127.0.0.1', int(sys.argv[1])), backlog=100);"
    "listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1);"
    "os.dup2(listener.fileno(), 9); os.execvp(sys.argv[2], sys.argv[2:])"
)


class Network:
    """A network namespace with nothing but a loopback interface."""

    def __init__(self) -> None:
        """Create the network, which exists until ``end`` is called."""
        for name in ("ip", "nft", "nsenter", "tc", "unshare"):
            program(name)
        self.holder = subprocess.Popen(
            ["unshare", "--net", *([] if _ROOT else ["--map-root-user"]), "sh", "-c", "ip link set lo up && exec cat"],
            stdin=subprocess.PIPE,  # cat ends when it is closed, even if the tests are killed
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
            missing(f"cannot create a network namespace: {self.holder.communicate()[1].decode()}")
        users = [] if _ROOT else ["--user", "--preserve-credentials"]
        self._enter = ["nsenter", f"--target={self.holder.pid}", "--net", *users]
        self.inside = [*self._enter, *_NOT_AS_ROOT]

    def freeze(self) -> None:
        """Drop every packet from now on."""
        self._drop("policy drop;")

    def forget(self, ports: Iterable[int]) -> None:
        """Drop the packets from and to these ports, as a firewall does after it has forgotten a connection."""
        named = ", ".join(map(str, ports))
        self._drop(f"tcp sport {{ {named} }} drop; tcp dport {{ {named} }} drop;")

    def slow_down(self, rate: str) -> None:
        """Let no more than this pass from now on, for example "40mbit" in a second."""
        queue = f"tc qdisc add dev lo root tbf rate {rate} burst 256kb latency 400ms"
        subprocess.run([*self._enter, *queue.split()], check=True)

    def _drop(self, rules: str) -> None:
        subprocess.run([*self._enter, "nft", _FROZEN % rules], check=True)

    def thaw(self) -> None:
        """Stop dropping packets."""
        subprocess.run([*self._enter, "nft", "delete table inet frozen"], check=True)

    def end(self) -> None:
        """Remove the network."""
        self.holder.communicate()


class NetworkPostgres(Postgres):
    """A PostgreSQL in a network that can be frozen. Its Unix socket is always reachable from outside."""

    url = as_url("host=127.0.0.1 port=5432 user=postgres dbname=postgres")

    def __init__(self, folder: Path, network: Network) -> None:
        """Create the cluster and start the server."""
        self.network = network
        super().__init__(folder)

    def start(self) -> None:
        """Start the server to learn its command, then restart it with that command inside the network."""
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
    """A service in a network that can be frozen. Its clients are outside."""

    def __init__(self, log: Path, postgres: NetworkPostgres) -> None:
        """Start the service with one worker."""
        port = free_port()
        super().__init__(
            log,
            [sys.executable, "wsgi.py", "--bind", "fd://9"],
            prefix=[sys.executable, "-c", _LISTEN, str(port), *postgres.network.inside],
            PORT=port,
            DATABASE_URL=postgres.url,
            WEB_CONCURRENCY=1,
        )
