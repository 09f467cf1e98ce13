"""Request ids, the access log, the nosniff header, and the path below which a proxy serves the service."""

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


REQUEST_ID = "todo_api.request_id"  # the key of a request's id in its WSGI environment
_PATH_LENGTH = 200  # characters in the log


def loggable(path: str | bytes) -> str:
    """Return a path for the log, without line breaks and of limited length."""
    quoted = quote(path, safe="/")
    return quoted if len(quoted) <= _PATH_LENGTH else f"{quoted[:_PATH_LENGTH]}..."


class Mount:
    """WSGI middleware for a service below a path, such as /todo.

    WSGI calls this path SCRIPT_NAME, and every URL in a response begins with it. A server such as gunicorn takes it
    from the environment, and removes it from the path of each request. ``prefix`` is a path that a proxy has removed.
    """

    def __init__(self, app: "WSGIApplication", prefix: str) -> None:
        """Create the middleware around an application."""
        self.app, self.prefix = app, prefix

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Return the response of the application."""
        script_name, path = environ.get("SCRIPT_NAME", ""), environ.setdefault("PATH_INFO", "")
        if script_name and path and not path.startswith("/"):  # gunicorn takes /todolist for a path below /todo
            script_name, environ["PATH_INFO"] = "", script_name + path
        environ["SCRIPT_NAME"] = self.prefix + script_name
        return self.app(environ, start_response)


class RequestLog:
    """WSGI middleware around the whole application. Every response gets an X-Request-ID and a line in the log."""

    def __init__(self, app: "WSGIApplication") -> None:
        """Create the middleware around an application."""
        self.app = app

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Return the response of the application. The id is the client's X-Request-ID if that is valid."""
        started = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = environ[REQUEST_ID] = given if _VALID_ID.fullmatch(given) else os.urandom(16).hex()

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
            path = loggable((environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1"))
            milliseconds = 1000 * (time.perf_counter() - started)
            log.info("%s %s %.3s %.1fms %s", environ["REQUEST_METHOD"], path, status, milliseconds, request_id)
            added = [("X-Request-ID", request_id), ("X-Content-Type-Options", "nosniff")]
            return start_response(status, headers + added, *exc_info)

        return self.app(environ, start)
