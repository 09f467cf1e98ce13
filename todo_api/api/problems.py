"""Turns every failure into one application/problem+json answer (RFC 9457)."""

import http
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, request
from werkzeug.exceptions import BadRequest, HTTPException, PreconditionFailed, ServiceUnavailable

from todo_api.database import InvalidValueError, UnavailableError

MEDIA_TYPE = "application/problem+json"

# status -> type, and the detail if the error that was raised has none of its own
KINDS: dict[int, tuple[str, str]] = {
    400: ("malformed_request", "The request is malformed"),
    404: ("not_found", "There is nothing at this URL"),
    405: ("method_not_allowed", "This URL does not support the method; the Allow header lists the supported ones"),
    412: ("precondition_failed", "The task is not at a version that If-Match names"),
    413: ("content_too_large", "The body is larger than the limit"),
    415: ("unsupported_media_type", "The body must be application/json"),
    422: ("idempotency_key_reused", "This Idempotency-Key was used with another body before"),
    500: ("internal_error", "The service failed; its log has the reason under the X-Request-ID of this answer"),
    503: ("database_unavailable", "The database is not available now; try again"),
}
VALIDATION_ERROR = "validation_error"

RETRY_AFTER = 1  # seconds; a restart of PostgreSQL takes about that long


class MalformedRequest(BadRequest):
    """The request cannot be read."""


class InvalidRequest(BadRequest):
    """The body or the query breaks its schema. ``errors`` lists each error with its pointer or parameter."""

    def __init__(self, errors: list[dict[str, str]]) -> None:
        """Use the details of all errors as the problem's detail."""
        super().__init__("; ".join(dict.fromkeys(error["detail"] for error in errors)))
        self.errors = errors


class VersionMismatch(PreconditionFailed):
    """The task is not at a version that If-Match names."""

    def __init__(self, etag: str) -> None:
        """Tell the task's current ETag, in the detail and as a header."""
        super().__init__(f"The task is not at a version that If-Match names; it is at {etag}")
        self.etag = etag

    def get_headers(self, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Return the headers of the answer, with the ETag."""
        return [*super().get_headers(*args, **kwargs), ("ETag", self.etag)]


def init_app(app: Flask) -> None:
    """Register the handlers. They replace flask-smorest's, which would drop headers such as Allow."""
    app.register_error_handler(HTTPException, problem_response)
    app.register_error_handler(
        UnavailableError, lambda _: problem_response(ServiceUnavailable(retry_after=RETRY_AFTER))
    )
    app.register_error_handler(InvalidValueError, lambda _: problem_response(MalformedRequest()))


def problem_response(error: HTTPException) -> Response:
    """Return the problem for an HTTP error, with the error's headers (Allow, Retry-After)."""
    status = error.code or 500
    kind, detail = KINDS.get(status) or kind_of(http.HTTPStatus(status).phrase)
    errors: list[dict[str, str]] = []
    if isinstance(error, InvalidRequest):
        kind, errors = VALIDATION_ERROR, error.errors
    if error.description != type(error).description:  # Werkzeug's own texts are attributes of the classes
        detail = error.description or detail
    instance = quote(request.path, safe="/:@!$&'()*+,;=~")
    response = Response(
        json.dumps(problem(status, kind, detail, instance, errors)), status=status, content_type=MEDIA_TYPE
    )
    response.headers.extend((name, value) for name, value in error.get_headers() if name != "Content-Type")
    return response


def kind_of(reason: str) -> tuple[str, str]:
    """Return the type of a problem that KINDS does not list, and its detail, from HTTP's reason phrase."""
    return reason.lower().replace(" ", "_").replace("-", "_"), reason


def problem(
    status: int, kind: str, detail: str, instance: str, errors: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
    """Return the members of a problem."""
    members: dict[str, Any] = {
        "type": kind,
        "title": kind.replace("_", " ").title(),
        "status": status,
        "detail": detail,
        "instance": instance,
    }
    if errors:
        members["errors"] = list(errors)
    return members


def field_errors(messages: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the errors of a problem for webargs' messages, ``{location: {field: [detail, ...]}}``."""
    return [
        ({"parameter": name} if location == "query" else {"pointer": _pointer(name)}) | {"detail": detail}
        for location, fields in messages.items()
        for name, details in sorted(fields.items())  # marshmallow lists unknown fields in no particular order
        for detail in details
    ]


def _pointer(name: str) -> str:
    return "#/" + quote(name.replace("~", "~0").replace("/", "~1"), safe="~")  # a URI fragment: RFC 6901, section 6
