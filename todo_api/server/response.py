"""gunicorn's response, changed to announce that the connection closes, and to send small bodies with their head."""

from http import HTTPStatus
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.body import ChunkedReader

_COPIED = 65_536  # bytes; a body of up to this size is copied behind the head; more is cheaper to send separately


class Response(wsgi.Response):
    """A response with "Connection: close" if its status is 413 or if the request's body was not read to its end.

    After the response, gunicorn reads and discards a part of the unread body, and closes the connection if there is
    more. Without the header, a proxy would send its next request on a connection that is about to close. A body of up
    to 64 KiB is sent in one piece with the head.
    """

    headers_sent: bool

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """Begin the response, and decide whether the connection closes after it."""
        write = super().start_response(status, headers, exc_info)
        if self.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE or not self._is_body_read():
            self.force_close()
        return write

    def _is_body_read(self) -> bool:
        body = self.req.body
        if body.failed or body.buf.tell():
            return False
        if isinstance(body.reader, ChunkedReader):
            return body.reader.parser is None
        return not body.reader.length

    def write(self, arg: bytes) -> None:
        """Send a part of the body. If it is the whole body and has up to 64 KiB, send the head with it, in one call."""
        if self.headers_sent or self._omits_body or self.response_length != len(arg) or len(arg) > _COPIED:
            super().write(arg)
            return
        head = [*self.default_headers(), *(f"{name}: {value}\r\n" for name, value in self.headers), "\r\n"]
        whole = "".join(head).encode("latin-1") + arg
        self.headers_sent = True
        self.sent = len(arg)
        self.sock.sendall(whole)
