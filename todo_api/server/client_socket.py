"""A client's socket. A response occupies a thread only while the client reads it quickly."""

import select
import socket
import time
from typing import Any

_PATIENCE = 0.1  # seconds for which a thread waits for the client to read


class ClientSocket(socket.socket):
    """A socket that keeps the part of a response that its client has not read in time."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over the connection of another socket object."""
        timeout = sock.gettimeout()
        super().__init__(fileno=sock.detach())
        self.settimeout(timeout)
        self._unsent: list[memoryview] = []

    @property
    def unsent(self) -> int:
        """Return how many bytes are kept."""
        return sum(map(len, self._unsent))

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send data, and keep the rest that the client does not read within a tenth of a second."""
        rest = memoryview(data)
        if not self._unsent:
            rest = rest[self._send(rest, flags) :]
            if rest:
                rest = self._wait_and_send(rest, flags)
        if rest:
            self._unsent.append(rest)

    def _wait_and_send(self, rest: memoryview, flags: int) -> memoryview:
        writable = select.poll()
        writable.register(self, select.POLLOUT)
        deadline = time.monotonic() + _PATIENCE
        while rest and (left := deadline - time.monotonic()) > 0:
            writable.poll(left * 1000)
            rest = rest[self._send(rest, flags) :]
        return rest

    def send_more(self) -> int:
        """Send a part of the unsent data, without waiting, and return how many bytes the connection has taken."""
        sent = self._send(first := self._unsent[0])
        self._unsent[:1] = [first[sent:]] if sent < len(first) else []
        return sent

    def _send(self, data: memoryview, flags: int = 0) -> int:
        try:
            return self.send(data, flags | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
