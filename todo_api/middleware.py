"""What every request gets: an id, a limit for its body, a line in the log, and headers that make browsers careful."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from flask import Flask
from flask_cors import CORS

from todo_api.json_body import announced, too_large

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

# Visible ASCII without quotes: nothing that could end a log line or start another.
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)


def configure_logging() -> None:
    """Send the logs to standard error; call it before anything logs."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for library in ("psycopg.pool", "yoyo"):
        logging.getLogger(library).setLevel(logging.WARNING)


def init_app(app: Flask, cors_origins: Sequence[str]) -> None:
    """Put this around each request of the application."""
    configure_logging()
    if cors_origins:
        CORS(
            app,
            resources="/api/*",
            origins=list(cors_origins),
            methods=["GET", "HEAD", "POST", "PATCH", "DELETE"],
            allow_headers=["Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "X-Request-ID"],
            expose_headers=["ETag", "Link", "Location", "Retry-After", "X-Request-ID"],
            always_send=False,  # only to browsers, and each gets its own origin
            max_age=600,  # seconds until a browser asks again whether it may
        )


def limit_body(environ: "WSGIEnvironment", limit: int) -> None:
    """Refuse a body that is announced as too large.

    Raises:
        RequestEntityTooLarge: it is.

    """
    if (announced(environ) or 0) > limit:
        raise too_large(environ, limit)


def finishing(environ: "WSGIEnvironment", start_response: "StartResponse") -> "StartResponse":
    """Give a request's ``start_response`` that adds the headers and logs; as hooks of Flask's this took 10 us more.

    The id is the caller's X-Request-ID where it is sane, or a new one.
    """
    started = time.perf_counter()
    given = environ.get("HTTP_X_REQUEST_ID", "")
    request_id = given if _SANE_ID.fullmatch(given) else os.urandom(16).hex()

    # Annotations in quotes: they would be worked out for each request.
    def start(status: str, headers: "list[tuple[str, str]]", *exc_info: Any) -> "Callable[[bytes], object]":
        path = quote(environ["PATH_INFO"].encode("latin-1"), safe="/")  # it can hold a line break
        milliseconds = 1000 * (time.perf_counter() - started)
        _log(f"{environ['REQUEST_METHOD']} {path} {status:.3} {milliseconds:.1f}ms {request_id}")
        added = [("X-Request-ID", request_id), ("X-Content-Type-Options", "nosniff")]
        return start_response(status, headers + added, *exc_info)

    return start


def _log(line: str) -> None:
    """Write what logging would write; its records, handlers and locks took 12 us more.

    Where it can't be written (nobody listens, or the disk is full) that costs no request.
    """
    now = time.time()
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    try:
        sys.stderr.write(f"{moment},{int(now % 1 * 1000):03} INFO todo_api.access: {line}\n")
    except (AttributeError, OSError, ValueError):  # None, as Python has it without one; broken or full; closed
        return
