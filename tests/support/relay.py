"""A relay in front of a PostgreSQL, which can delay or reject connections as proxies and hosted databases do."""

import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

_SSL_REQUEST = 80877103


class SlowRelay:
    """A TCP port that leads to a PostgreSQL on a Unix socket. Each connection waits before it is passed on."""

    def __init__(self, conninfo: str, delay: float = 0.0) -> None:
        """Listen. ``delay`` is in seconds and may be changed later."""
        self._conninfo = conninfo
        parts = conninfo_to_dict(conninfo)
        self._target = f"{parts['host']}/.s.PGSQL.{parts['port']}"
        self.delay = delay
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def conninfo(self) -> str:
        """Return the connection string that leads through the relay."""
        return make_conninfo(self._conninfo, host="127.0.0.1", port=self.port)

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def secure(self, client: socket.socket) -> socket.socket:
        """Answer a request for TLS, and return the socket to go on with."""
        client.sendall(b"N")
        return client

    def answer(self, startup: bytes) -> bytes | None:
        """Return a response to a startup packet that ends the connection, or None to pass the packet on."""
        del startup
        return None

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        time.sleep(self.delay)
        with suppress(OSError, struct.error), client, socket.socket(socket.AF_UNIX) as server:
            packet = _startup_packet(client)
            if struct.unpack("!I", packet[4:8])[0] == _SSL_REQUEST:
                client = self.secure(client)
                packet = _startup_packet(client)
            if (answer := self.answer(packet)) is not None:
                client.sendall(answer)
                return
            server.connect(self._target)
            server.sendall(packet)
            threading.Thread(target=_pass_on, args=(server, client), daemon=True).start()
            _pass_on(client, server)


class StrictRelay(SlowRelay):
    """A relay that rejects command-line options in the words of Amazon's RDS Proxy."""

    def answer(self, startup: bytes) -> bytes | None:
        """Reject a startup packet that has options."""
        if b"\0options\0" not in startup:
            return None
        message = "RDS Proxy currently doesn't support command-line options"
        fields = f"SFATAL\0VFATAL\0C0A000\0M{message}\0\0".encode()
        return b"E" + struct.pack("!I", len(fields) + 4) + fields


def _startup_packet(client: socket.socket) -> bytes:
    packet = b""
    while len(packet) < 4 or len(packet) < struct.unpack("!I", packet[:4])[0]:
        if not (received := client.recv(65_536)):  # the client then waits, so this is no more than the packet
            raise ConnectionError("the client has gone")
        packet += received
    return packet


def _pass_on(source: socket.socket, to: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            to.sendall(data)
    with suppress(OSError):
        to.shutdown(socket.SHUT_RDWR)


def sockets_to(pid: int, port: int) -> int:
    """Return how many sockets of a process are connected, or connect, to a port of 127.0.0.1."""
    remote = f"0100007F:{port:04X}"
    table = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text(encoding="ascii").splitlines()]
    inodes = {f"socket:[{line[9]}]" for line in table if line[2] == remote}
    found = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found += str(file.readlink()) in inodes
    return found
