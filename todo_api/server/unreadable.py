"""The responses to requests that gunicorn cannot parse and so does not pass to the application."""

import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus

import gunicorn.util
from gunicorn.http import errors

from todo_api.api import problems
from todo_api.api.middleware import UNKNOWN_ROUTE, without_tokens
from todo_api.metrics import OTHER, metrics
from todo_api.server import gunicorn_check

log = logging.getLogger(__name__)

QUOTED = 60  # characters of what a client sent
_MESSAGE_LENGTH = 500  # characters of a line in gunicorn's log
_GUNICORNS_LINE = "Invalid request from ip="  # ours also has the id of the response

# For each exception of gunicorn: the reason, and the attribute with the invalid part of the request.
_REASONS: dict[type[Exception], tuple[str, str]] = {
    errors.InvalidRequestMethod: ("The method must be 3 to 20 letters in upper case", "method"),
    errors.InvalidRequestLine: (
        "The first line must be a method, a URL and HTTP/1.1, in ASCII; other characters are percent-encoded in a URL",
        "req",
    ),
    errors.InvalidHTTPVersion: ("The HTTP version must be 1.0 or 1.1", ""),
    errors.InvalidHeaderName: ("Invalid header name", "hdr"),
    errors.InvalidHeader: ("Invalid or repeated header", "hdr"),
    errors.ObsoleteFolding: ("A header must be on one line", "hdr"),
    errors.ExpectationFailed: ("The only supported expectation is 100-continue", "expect"),
    errors.UnsupportedTransferCoding: ("The only supported transfer coding is chunked", "hdr"),
    errors.LimitRequestLine: ("The URL is too long", ""),
    errors.LimitRequestHeaders: ("The headers are too many or too large", ""),
}
_TIMEOUT = "The request was incomplete after the time limit"
_FORBIDDEN = "The TLS or the PROXY protocol failed, or this client may not use it"
_OUTSIDE = "The path does not begin with SCRIPT_NAME; if a proxy removes that prefix, set URL_PREFIX instead"


class Limit(logging.Filter):
    """Passes the first records of each period and counts the others, because one client could fill the disk.

    The first record of a later period says how many were left out.
    """

    def __init__(self, records: int, seconds: float) -> None:
        """Create a filter that passes a number of records in a number of seconds."""
        super().__init__()
        self.records, self.seconds = records, seconds
        self.began = -seconds
        self.count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record passes."""
        now = time.monotonic()
        if now - self.began > self.seconds:
            if self.count > self.records:
                record.msg = f"{record.msg} ({self.count - self.records} more since the last such line)"
            self.began, self.count = now, 0
        self.count += 1
        return self.count <= self.records


def install_problems() -> None:
    """Make gunicorn respond to unreadable requests with problems instead of HTML. gunicorn has no hook for this."""
    if not gunicorn_check.difference():
        gunicorn.util.write_error = _write_problem
        logging.getLogger("gunicorn.error").addFilter(_shorten)
    if not log.filters:
        log.addFilter(Limit(10, 60))


def _shorten(record: logging.LogRecord) -> bool:
    message = without_tokens(record.getMessage())
    record.msg, record.args = message if len(message) <= _MESSAGE_LENGTH else f"{message[:_MESSAGE_LENGTH]}...", ()
    return not message.startswith(_GUNICORNS_LINE)


def _write_problem(connection: socket.socket, status: int, _reason: str, _message: str) -> None:
    request_id = os.urandom(16).hex()
    error = sys.exception()  # gunicorn calls this function while it handles the error
    if isinstance(error, errors.ConfigurationProblem):  # a request causes only one: its path is outside of SCRIPT_NAME
        status, detail = HTTPStatus.NOT_FOUND, _OUTSIDE
    elif status == HTTPStatus.FORBIDDEN:  # gunicorn's are of TLS and of the PROXY protocol; ours is another problem
        status, detail = HTTPStatus.BAD_REQUEST, _FORBIDDEN
    else:
        detail = _detail(status, error)
    peer: object = None
    with suppress(OSError):  # the client may have gone
        peer = connection.getpeername()
    client = peer[0] if isinstance(peer, tuple) else "an unknown address"
    fields = {"client": client, "status": int(status), "request_id": request_id}
    log.warning(*("unreadable request from %s: %d %s %s", client, status, detail, request_id), extra={"fields": fields})
    metrics.observe(OTHER, UNKNOWN_ROUTE, str(status), 0)  # the request ends as soon as it is there
    gunicorn.util.write_nonblock(connection, problem_bytes(status, detail, {"X-Request-ID": request_id}))


def _detail(status: int, error: BaseException | None) -> str:
    for kind, (text, attribute) in _REASONS.items():
        if isinstance(error, kind):
            return f"{text}: {_quoted(getattr(error, attribute), attribute)}" if attribute else text
    if status == HTTPStatus.REQUEST_TIMEOUT:
        return _TIMEOUT
    _, detail = problems.kind_of(status)
    return detail


def _quoted(part: object, attribute: str) -> str:
    """Quote the beginning of a part of a request, without a query and without the value of a header."""
    if attribute == "hdr" and not re.match(r"[A-Za-z-]{1,40}(?![^:\s])", str(part)):
        return "..."  # not the name of a header; it may be the second line of a long value, such as a token
    ends = r"[?]" if attribute == "req" else r"[?:\s]"
    return ascii(without_tokens(re.split(ends, str(part), maxsplit=1)[0])[:QUOTED])


def problem_bytes(status: int, detail: str, headers: Mapping[str, str]) -> bytes:
    """Return a whole response with a problem. The connection closes after it."""
    kind, _ = problems.kind_of(status)
    content = json.dumps(problems.problem(status, kind, detail, "")).encode()
    all_headers = {
        "Connection": "close",
        "Content-Type": problems.MEDIA_TYPE,
        "Content-Length": len(content),
        "X-Content-Type-Options": "nosniff",
        **headers,
    }
    phrase = HTTPStatus(status).phrase  # not gunicorn's, which is "Bad Request" for a 501
    lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in all_headers.items()), "", ""]
    return "\r\n".join(lines).encode("ascii") + content
