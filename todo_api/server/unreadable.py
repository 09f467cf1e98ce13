"""The responses to requests that gunicorn cannot parse and so does not pass to the application."""

import json
import logging
import os
import socket
from http import HTTPStatus

import gunicorn.util

from todo_api.api import problems
from todo_api.server import gunicorn_check

log = logging.getLogger(__name__)


def install_problems() -> None:
    """Make gunicorn respond to unreadable requests with problems instead of HTML. gunicorn has no hook for this."""
    if not gunicorn_check.difference():
        gunicorn.util.write_error = _write_problem


def _write_problem(connection: socket.socket, status: int, reason: str, message: str) -> None:
    request_id = os.urandom(16).hex()
    log.warning("unreadable request: %d %s %r %s", status, reason, message, request_id)
    gunicorn.util.write_nonblock(connection, _response(status, request_id))


def _response(status: int, request_id: str) -> bytes:
    kind, detail = problems.kind_of(status)
    content = json.dumps(problems.problem(status, kind, detail, "")).encode()
    headers = {
        "Connection": "close",
        "Content-Type": problems.MEDIA_TYPE,
        "Content-Length": len(content),
        "X-Content-Type-Options": "nosniff",
        "X-Request-ID": request_id,
    }
    phrase = HTTPStatus(status).phrase  # not gunicorn's, which is "Bad Request" for a 501
    lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("ascii") + content
