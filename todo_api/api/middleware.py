"""Request ids, the access log and figures, the nosniff header, and the path below which a proxy serves the service."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("todo_api.access")

# ASCII letters, digits and some punctuation. None of these characters can end a log line.
_VALID_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)
# W3C Trace Context, section 3.2.2: the version, the id of the trace, that of the caller's span, flags, and what later
# versions may add.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?", re.ASCII)
# The first part of a JSON Web Token is base64url of {" and more; the other two follow after a dot.
_TOKEN = re.compile(r"ey[A-L][\w-]*\.[\w.-]*", re.ASCII)
_LONG = 12  # characters; a client's id that is shorter may by chance be a part of its token

# The keys of a request's WSGI environment: its id, the trace that it belongs to, and the user of its token.
REQUEST_ID = "todo_api.request_id"
TRACE_ID = "todo_api.trace_id"
USER = "todo_api.user"
_PATH_LENGTH = 200  # characters in the log
_SAFE_IN_A_USER = "@:|/+=,~"  # characters that ids of users often have; other ones are percent-encoded
_PARAMETER = re.compile(r"<(?:[^<>]*:)?([^<>:]+)>")  # in a rule of Werkzeug
UNKNOWN_ROUTE = "unknown"

# Takes the method, the route and the status of a request, and the seconds until its response began.
Observe = Callable[[str, str, str, float], None]


def without_tokens(text: str) -> str:
    """Return a text for the log, without JSON Web Tokens."""
    return _TOKEN.sub("...", text) if "ey" in text else text


def loggable(path: str | bytes) -> str:
    """Return a path for the log, without tokens and line breaks, and of limited length."""
    quoted = without_tokens(quote(path, safe="/"))
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

    def __init__(self, app: "WSGIApplication", observe: Observe | None) -> None:
        """Create the middleware around an application. ``observe`` counts the requests, if they are to be counted."""
        self.app, self.observe = app, observe

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Return the response of the application. The id is the client's X-Request-ID if that is valid."""
        started = time.perf_counter()
        request_id = environ[REQUEST_ID] = _request_id(environ)
        if "HTTP_TRACEPARENT" in environ:
            environ[TRACE_ID] = _trace_id(environ["HTTP_TRACEPARENT"])

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
            seconds = time.perf_counter() - started
            route = _route(environ)
            if self.observe:
                self.observe(environ["REQUEST_METHOD"], route, status[:3], seconds)
            if log.isEnabledFor(logging.INFO):
                _log(environ, route, status[:3], 1000 * seconds)
            added = [("X-Request-ID", request_id), ("X-Content-Type-Options", "nosniff")]
            return start_response(status, headers + added, *exc_info)

        return self.app(environ, start)


def _request_id(environ: "WSGIEnvironment") -> str:
    """Return the client's X-Request-ID, or a new one if that is invalid or, by mistake, a token or a part of it."""
    given: str = environ.get("HTTP_X_REQUEST_ID", "")
    if not _VALID_ID.fullmatch(given) or _TOKEN.search(given):
        return os.urandom(16).hex()
    if len(given) >= _LONG and given in environ.get("HTTP_AUTHORIZATION", ""):
        return os.urandom(16).hex()
    return given


def _trace_id(traceparent: str) -> str:
    """Return the id of the trace in a Traceparent header, or an empty string if the header is invalid."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if not match:
        return ""
    version, trace, span, more = match.groups()
    is_invalid = version == "ff" or (version == "00" and more) or not trace.strip("0") or not span.strip("0")
    return "" if is_invalid else trace


def _log(environ: "WSGIEnvironment", route: str, status: str, milliseconds: float) -> None:
    path = loggable((environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1"))
    method, request_id = environ["REQUEST_METHOD"], environ[REQUEST_ID]
    fields = {
        "method": method,
        "path": path,
        "route": route,
        "status": int(status),
        "duration_ms": round(milliseconds, 3),
        "request_id": request_id,
    }
    more = ""
    if trace_id := environ.get(TRACE_ID):
        fields["trace_id"] = trace_id
        more += f" trace_id={trace_id}"
    if user := environ.get(USER):
        fields["user"] = user
        more += f" user={quote(user, safe=_SAFE_IN_A_USER)}"
    log.info("%s %s %s %.1fms %s%s", method, path, status, milliseconds, request_id, more, extra={"fields": fields})


def _route(environ: "WSGIEnvironment") -> str:
    """Return the route of a request, such as /api/tasks/{task_id}, or "unknown" if no route has its path and method."""
    request = environ.get("werkzeug.request")  # Flask has made it, unless the request did not get that far
    return _openapi_path(request.url_rule.rule) if request and request.url_rule else UNKNOWN_ROUTE


@lru_cache(maxsize=64)
def _openapi_path(rule: str) -> str:
    return _PARAMETER.sub(r"{\1}", rule)
