"""Gives every request an id, a line in the log, and headers that make browsers careful."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("todo_api.access")

# Visible ASCII characters without quotes, which can neither end a log line nor start another one.
_VALID_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)


class RequestLog:
    """WSGI middleware around the whole application, so that no answer is without an id and a line in the log."""

    def __init__(self, app: "WSGIApplication") -> None:
        """Wrap an application."""
        self.app = app

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Answer a request. Its id is the client's X-Request-ID if that is valid, or else a new one."""
        started = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = given if _VALID_ID.fullmatch(given) else os.urandom(16).hex()

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
            path = quote(environ["PATH_INFO"].encode("latin-1"), safe="/")  # decoded, it can contain a line break
            milliseconds = 1000 * (time.perf_counter() - started)
            log.info("%s %s %.3s %.1fms %s", environ["REQUEST_METHOD"], path, status, milliseconds, request_id)
            added = [("X-Request-ID", request_id), ("X-Content-Type-Options", "nosniff")]
            return start_response(status, headers + added, *exc_info)

        return self.app(environ, start)
