"""gunicorn's response, which announces when the connection closes, and is sent in one piece."""

from http import HTTPStatus
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.body import ChunkedReader

_COPIED = 65_536  # bytes of a body that are copied behind the head; a larger one is cheaper to send by itself


class Response(wsgi.Response):
    """A response that says "Connection: close" if the request's body was not read to its end.

    gunicorn discards some of the rest after the response, and closes the connection if there is more. Without the
    announcement a proxy would send its next request on a connection that is about to close.
    """

    headers_sent: bool

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """Begin the response."""
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
        """Send a part of the body; the first one together with the head, in one packet instead of two."""
        if self.headers_sent or self._omits_body or self.response_length != len(arg) or len(arg) > _COPIED:
            super().write(arg)
            return
        head = [*self.default_headers(), *(f"{name}: {value}\r\n" for name, value in self.headers), "\r\n"]
        whole = "".join(head).encode("latin-1") + arg
        self.headers_sent = True
        self.sent = len(arg)
        self.sock.sendall(whole)
