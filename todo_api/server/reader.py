"""Receives requests without waiting for slow clients.

A request occupies a thread once it has arrived whole, or if its body is larger than 1 MiB. A chunked body may have
2 MiB, with the sizes of its chunks, or eight times the body's limit if that is less.
"""

import re
import socket
import time

from gunicorn.http.errors import InvalidRequestLine, LimitRequestHeaders
from gunicorn.http.message import MAX_REQUEST_LINE
from gunicorn.http.unreader import SocketUnreader

REQUEST_TIMEOUT = 20.0  # seconds for a whole request, which occupies no thread meanwhile
BODY_TIMEOUT = 5.0  # seconds for the rest of a body that is too large to be kept here; a thread waits only for that
HEAD_SIZE = 32 * 1024  # bytes; nginx accepts as much
KEPT_BODY = 1024 * 1024  # bytes

_PIECE = 64 * 1024  # bytes
_LINE_SIZE = 8 * 1024  # bytes of a chunk's size and its extensions; gunicorn accepts as much
_BLANK_LINE = b"\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_REQUEST_LINE = re.compile(rb"[!-~]+ [!-~]+ HTTP/[0-9]\.[0-9]")  # gunicorn rejects any other one
_NOT_IN_A_HEAD = re.compile(rb"[^\t\r\n -~]")
_LENGTHS = re.compile(rb"\r\ncontent-length:[ \t]*0*([0-9]{1,18})[ \t]*(?=\r)")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:(?:[^\r]*[, \t])?chunked[ \t]*\r")
_EXPECT = re.compile(rb"^[^\r]* http/1\.1\r\n.*?\r\nexpect:[ \t]*100-continue[ \t]*\r", re.DOTALL)
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}(?=[ \t;\r])")


class Reader(SocketUnreader):
    """The source from which gunicorn's parser reads the requests of a connection."""

    def __init__(self, sock: socket.socket, body_limit: int) -> None:
        """Create the reader.

        ``body_limit`` is in bytes. A larger body is not awaited, because the application rejects it.
        """
        super().__init__(sock)
        self.body_limit = body_limit
        self.data = bytearray()
        self.deadline = 0.0  # of the request that has begun
        self._begin()

    def _begin(self) -> None:
        self.data[:0] = self.take_buffered()  # the parser has put back what follows the previous request
        self.is_whole = False
        self._at = 0  # where to continue: in the head, or at the size of a chunk
        self._end = 0  # of the request, or of the part that the application needs; 0 before the end of the head
        self._is_chunked = False
        self._is_large = False  # too large to be kept here
        self._in_chunks = 0  # bytes

    def has_more(self) -> bool:
        """Return whether the client has sent a part of its next request already."""
        return bool(self.data or self.buf.getvalue())

    def receive(self) -> bool:
        """Receive what the client has sent. Return whether a request is complete, or can no longer become complete.

        Raises:
            ParseException: the data is not a request.

        """
        if self.is_whole:
            self._begin()
            if self.data:
                self.deadline = time.monotonic() + REQUEST_TIMEOUT
                self.is_whole = self._has_request()
        if not self.is_whole:  # otherwise the data of a client that pipelines requests would only accumulate here
            self._receive_piece()
        if self.is_whole:
            self.deadline = time.monotonic() + (BODY_TIMEOUT if self._is_large else 0)
        return self.is_whole

    def _receive_piece(self) -> None:
        try:
            piece = self.sock.recv(_PIECE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not self.data:
            self.deadline = time.monotonic() + REQUEST_TIMEOUT
        self.data += piece
        # At the end of the connection, the parser finds out what is missing.
        self.is_whole = (bool(self.data) and self._has_request()) or not piece

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Return the next bytes for the parser. This waits only for a body that is too large to be kept here."""
        size = max(size_hint or 0, self.mxchunk)
        if self.data:
            piece = bytes(self.data[:size])
            del self.data[:size]
            return piece
        timeout = self.sock.gettimeout()
        self.sock.settimeout(max(self.deadline - time.monotonic(), 0.001))
        try:
            received: bytes = self.sock.recv(size)
        finally:
            self.sock.settimeout(timeout)
        return received

    def _has_request(self) -> bool:
        if not self._end:
            end = self.data.find(_BLANK_LINE, max(0, self._at - 3))
            self._at = len(self.data)
            if end < 0:
                return self._is_rejected(self._at - 3)  # a part of the blank line may be there
            if end > HEAD_SIZE:
                return self._is_rejected(end)
            self._read_head(end + len(_BLANK_LINE))
        return self._has_chunks() if self._is_chunked else len(self.data) >= self._end

    def _is_rejected(self, size: int) -> bool:
        """Return whether the parser rejects an unfinished or too large head without reading more."""
        line, ended, _ = bytes(self.data).removeprefix(b"\r\n").partition(b"\r\n")
        if _NOT_IN_A_HEAD.search(line):
            raise InvalidRequestLine(line.decode("latin-1"))
        if len(line) > MAX_REQUEST_LINE + 1 or (ended and not _REQUEST_LINE.fullmatch(line)):
            return True
        if size > HEAD_SIZE:
            raise LimitRequestHeaders(f"larger than {HEAD_SIZE} bytes")
        return self.data.count(b"\n") != self.data.count(b"\r\n")

    def _read_head(self, end: int) -> None:
        """Find out where the request ends. gunicorn rejects a head that has both a length and chunks."""
        self._at = self._end = end
        head = bytes(self.data[:end]).lower()
        lengths = [int(length) for length in _LENGTHS.findall(head)]
        self._is_chunked = bool(_CHUNKED.search(head)) and not lengths
        awaited = self._is_chunked or (len(lengths) == 1 and lengths[0] <= self.body_limit)
        if awaited and _EXPECT.search(head) and len(self.data) == end:
            self.sock.send(_CONTINUE, socket.MSG_DONTWAIT)
        if awaited and lengths:
            self._is_large = lengths[0] > KEPT_BODY
            self._end += 0 if self._is_large else lengths[0]

    def _has_chunks(self) -> bool:
        """Return whether the last chunk is there, or more bytes than the application reads, or an invalid chunk."""
        while True:
            line_end = self.data.find(b"\r\n", self._at)
            if line_end < 0:
                line_size = len(self.data) - self._at
                return line_size > _LINE_SIZE or b"\n" in self.data[self._at :] or self._is_too_large(0)
            size = _CHUNK_SIZE.match(self.data, self._at, line_end + 1)
            if not size:
                return True
            start, length = line_end + 2, int(size[0], 16)
            if not length:  # it is followed by trailers, which end with a blank line
                return self.data.find(_BLANK_LINE, line_end) >= 0 or self._is_too_large(0)
            here = len(self.data) - start
            if here < length + 2:
                return self._is_too_large(min(here, length))
            self._in_chunks += length
            self._at = start + length + 2

    def _is_too_large(self, unfinished: int) -> bool:
        if self._in_chunks + unfinished > self.body_limit:
            return True
        # A chunk of one byte takes six bytes.
        self._is_large = len(self.data) - self._end > min(2 * KEPT_BODY, 8 * self.body_limit)
        return self._is_large
