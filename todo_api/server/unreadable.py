"""The answers to requests that gunicorn cannot read, so that no application sees them."""

import json
import logging
import socket
import uuid
from http import HTTPStatus

import gunicorn.util

from todo_api.api import problems
from todo_api.server import tested

log = logging.getLogger(__name__)


def install() -> None:
    """Make gunicorn answer with problems instead of HTML, for which it has no hook."""
    if not tested.difference():
        gunicorn.util.write_error = _write_problem


def _write_problem(connection: socket.socket, status: int, reason: str, message: str) -> None:
    request_id = uuid.uuid4().hex
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
