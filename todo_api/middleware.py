"""What every request gets: an id, a limit for its body, a line in the log, and headers that make browsers careful."""

import logging
import re
import sys
import time
import uuid
from collections.abc import Sequence
from urllib.parse import quote

from flask import Flask, Response, g, request
from flask_cors import CORS

from todo_api.json_body import too_large

access_log = logging.getLogger("todo_api.access")

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
    app.before_request(_begin)
    app.after_request(_end)


def request_id() -> str:
    """Give this request's id: the caller's X-Request-ID where it is sane, or a new one."""
    given = request.headers.get("X-Request-ID", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _begin() -> None:
    g.started = time.perf_counter()
    g.request_id = request_id()
    if (request.content_length or 0) > (request.max_content_length or 0):
        raise too_large(request)


def _end(response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    access_log.info(
        "%s %s %d %.1fms %s",
        request.method,
        quote(request.path, safe="/"),  # a path can hold a line break
        response.status_code,
        1000 * (time.perf_counter() - g.started),
        g.request_id,
    )
    return response
