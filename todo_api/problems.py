"""Every failure, whoever raises it, becomes one application/problem+json answer (RFC 9457)."""

import http
import json
import logging
import socket
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import gunicorn.util
import psycopg
from flask import Flask, Response, current_app, request
from werkzeug.exceptions import BadRequest, HTTPException, InternalServerError, PreconditionFailed, ServiceUnavailable

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

# status -> type, and what the problem says where whoever raised it says nothing better
KINDS: dict[int, tuple[str, str]] = {
    400: ("malformed_request", "The request can't be read"),
    404: ("not_found", "There is nothing here"),
    405: ("method_not_allowed", "This URL does not answer that method; the Allow header lists those it does"),
    412: ("precondition_failed", 'If-Match names no version that the task is at; it is at "1" by now'),
    413: ("content_too_large", "The body is larger than the service takes"),
    415: ("unsupported_media_type", "The body must be application/json"),
    422: ("idempotency_key_reused", "This Idempotency-Key came with another body before"),
    500: ("internal_error", "Something went wrong in the service; it is in its log, under this answer's X-Request-ID"),
    503: ("database_unavailable", "The database can't do this just now; try again"),
}

RETRY_AFTER = 1  # seconds; a restart of PostgreSQL takes about that long


class MalformedRequest(BadRequest):
    """The request can't be read, whatever the schema says."""


class ValidationFailed(BadRequest):
    """The body or the query breaks its schema; ``errors`` has each break as pointer or parameter, and detail."""

    def __init__(self, errors: list[dict[str, str]]) -> None:
        """Say all that is wrong in the problem's detail, too."""
        super().__init__("; ".join(dict.fromkeys(error["detail"] for error in errors)))
        self.errors = errors


class VersionMismatch(PreconditionFailed):
    """The task is not at the version that If-Match names; the answer says at which it is."""

    def __init__(self, etag: str) -> None:
        """Keep the task's ETag for the answer."""
        super().__init__(f"If-Match names no version that the task is at; it is at {etag} by now")
        self.etag = etag

    def get_headers(self, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Add the ETag."""
        return [*super().get_headers(*args, **kwargs), ("ETag", self.etag)]


# The one table from what PostgreSQL and psycopg raise to what HTTP says; the first line that fits counts.
DATABASE_ERRORS: list[tuple[type[psycopg.Error], type[HTTPException]]] = [
    (psycopg.OperationalError, ServiceUnavailable),  # down, restarting, full, timed out, and the pool's own errors
    (psycopg.errors.ReadOnlySqlTransaction, ServiceUnavailable),  # 25006: a standby, while a failover goes on
    (psycopg.DataError, MalformedRequest),  # class 22: a value that no column can hold
]


def from_database_error(error: psycopg.Error) -> HTTPException:
    """Find the HTTP error for a database error; what the table does not know is a bug, so a 500."""
    raised = next((http_error for kind, http_error in DATABASE_ERRORS if isinstance(error, kind)), InternalServerError)
    if raised is ServiceUnavailable:
        return ServiceUnavailable(retry_after=RETRY_AFTER)
    return raised()


def violations(messages: Mapping[str, Any]) -> list[dict[str, str]]:
    """Flatten webargs' messages, ``{location: {name: [detail, …]}}``, into what a problem lists."""
    return [
        ({"parameter": name} if location == "query" else {"pointer": _pointer(name)}) | {"detail": detail}
        for location, names in messages.items()
        for name, details in sorted(names.items())  # marshmallow lists unknown names in no order
        for detail in details
    ]


def _pointer(name: str) -> str:
    return "#/" + quote(name.replace("~", "~0").replace("/", "~1"), safe="~")  # a URI fragment: RFC 6901, section 6


def body(
    status: int, kind: str, detail: str, instance: str, errors: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
    """Make a problem's members."""
    problem: dict[str, Any] = {
        "type": kind,
        "title": kind.replace("_", " ").title(),
        "status": status,
        "detail": detail,
        "instance": instance,
    }
    if errors:
        problem["errors"] = list(errors)
    return problem


def answer(error: HTTPException) -> Response:
    """Turn an HTTP error into its problem, with the headers that belong to it (Allow, Retry-After)."""
    status = error.code or 500
    kind, detail = KINDS.get(status) or _unlisted(status)
    errors: list[dict[str, str]] = []
    if isinstance(error, ValidationFailed):
        kind, errors = "validation_error", error.errors
    # A text of werkzeug's is the class's; one of ours is the instance's.
    detail = vars(error).get("description", detail)
    response = Response(
        json.dumps(body(status, kind, detail, quote(request.path, safe="/:@!$&'()*+,;=~"), errors)),
        status=status,
        content_type=MEDIA_TYPE,
    )
    response.headers.extend((name, value) for name, value in error.get_headers() if name != "Content-Type")
    return response


def _unlisted(status: int) -> tuple[str, str]:
    known = http.HTTPStatus(status)
    return known.phrase.lower().replace(" ", "_").replace("-", "_"), known.description or known.phrase


def answer_database_error(error: psycopg.Error) -> Response:
    """Turn a database error into its problem; the log has its class and SQLSTATE, and nothing of what was stored."""
    http_error = from_database_error(error)
    if isinstance(http_error, InternalServerError):
        raise error  # a bug: Flask logs its traceback and comes back with a 500
    current_app.logger.warning("database error: %s (SQLSTATE %s)", type(error).__name__, error.sqlstate)
    return answer(http_error)


def init_app(app: Flask) -> None:
    """Answer database errors; flask-smorest's handler, in openapi.Api, passes everything else to ``answer``."""
    app.register_error_handler(psycopg.Error, answer_database_error)
    # gunicorn has no hook for its answer to a request that it can't read, which is HTML.
    gunicorn.util.write_error = _answer_unread


def _answer_unread(connection: socket.socket, status: int, reason: str, message: str) -> None:
    """Answer a request that gunicorn could not read, so that no application saw it."""
    request_id = uuid.uuid4().hex
    log.warning("unreadable request: %d %s %r %s", status, reason, message, request_id)
    gunicorn.util.write_nonblock(connection, _raw_answer(status, reason, request_id))


def _raw_answer(status: int, reason: str, request_id: str) -> bytes:
    kind, detail = KINDS.get(status, (reason.lower().replace(" ", "_"), reason))
    content = json.dumps(body(status, kind, detail, "")).encode()
    head = {
        "Connection": "close",
        "Content-Type": MEDIA_TYPE,
        "Content-Length": len(content),
        "X-Content-Type-Options": "nosniff",
        "X-Request-ID": request_id,
    }
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode("ascii") + content
