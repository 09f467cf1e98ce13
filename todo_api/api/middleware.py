"""Request ids, the access log, and a header that prevents browsers from guessing media types."""

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

# ASCII letters, digits and some punctuation. None of these characters can end a log line.
_VALID_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)


class RequestLog:
    """WSGI middleware around the whole application. Every response gets an X-Request-ID and a line in the log."""

    def __init__(self, app: "WSGIApplication") -> None:
        """Create the middleware around an application."""
        self.app = app

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Return the response of the application. The id is the client's X-Request-ID if that is valid."""
        started = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = given if _VALID_ID.fullmatch(given) else os.urandom(16).hex()

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
            path = quote(environ["PATH_INFO"].encode("latin-1"), safe="/")  # a decoded path can contain a line break
            milliseconds = 1000 * (time.perf_counter() - started)
            log.info("%s %s %.3s %.1fms %s", environ["REQUEST_METHOD"], path, status, milliseconds, request_id)
            added = [("X-Request-ID", request_id), ("X-Content-Type-Options", "nosniff")]
            return start_response(status, headers + added, *exc_info)

        return self.app(environ, start)
