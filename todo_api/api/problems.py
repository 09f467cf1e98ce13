"""Problems: every error response has the same format, application/problem+json (RFC 9457)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, request
from werkzeug.exceptions import BadRequest, HTTPException, PreconditionFailed, ServiceUnavailable, Unauthorized
from werkzeug.http import HTTP_STATUS_CODES

from todo_api.database import InvalidValueError, UnavailableError

MEDIA_TYPE = "application/problem+json"

# HTTP status -> the type of the problem, and its detail unless the error has a more specific one
KINDS: dict[int, tuple[str, str]] = {
    400: ("malformed_request", "The request is malformed"),
    401: ("authentication_required", "The request needs a bearer token in its Authorization header"),
    403: ("cross_origin_refused", "The request comes from a page of an origin that CORS_ORIGINS does not list"),
    404: ("not_found", "There is nothing at this URL"),
    405: ("method_not_allowed", "This URL does not support the method; the Allow header lists the supported ones"),
    412: ("precondition_failed", "The task is not at a version that If-Match names"),
    413: ("content_too_large", "The body is larger than the limit"),
    414: ("uri_too_long", "The URL is too long"),
    415: ("unsupported_media_type", "The body must have no Content-Encoding, and be application/json"),
    417: ("expectation_failed", "The service does not support this Expect header"),
    421: ("misdirected_request", "The service does not serve this Host; TRUSTED_HOSTS lists the hosts to add"),
    422: ("idempotency_key_reused", "This Idempotency-Key was used before, with another body"),
    431: ("request_header_fields_too_large", "The request has too many or too large header fields"),
    500: ("internal_error", "The log has the reason; search it for the X-Request-ID of this response"),
    501: ("not_implemented", "The service does not support this Transfer-Encoding"),
    503: ("database_unavailable", "The database is not available now; retry later"),
}
# Types of problems that share their status with one of those above.
VALIDATION_ERROR = "validation_error"
INVALID_BEARER = "invalid_token"
KEYS_UNAVAILABLE = "keys_unavailable"
DRAINING = "draining"
OTHER_KINDS: dict[str, tuple[int, str]] = {
    VALIDATION_ERROR: (400, "A field or a query parameter is invalid"),
    INVALID_BEARER: (401, "The token is not valid here, or not valid now"),
    KEYS_UNAVAILABLE: (503, "The keys that verify tokens are not available now; retry later"),
    DRAINING: (503, "The service is about to stop; it still serves all other requests"),
}

RETRY_AFTER = 1  # seconds; a restart of PostgreSQL takes about that long


class MalformedRequest(BadRequest):
    """The request cannot be parsed."""


class InvalidRequest(BadRequest):
    """The body or the query is invalid. ``errors`` lists each error with its pointer or parameter."""

    kind = VALIDATION_ERROR

    def __init__(self, errors: list[dict[str, str]]) -> None:
        """Create the error. Its description joins the details of all ``errors``."""
        super().__init__("; ".join(dict.fromkeys(error["detail"] for error in errors)))
        self.errors = errors


class AuthenticationRequired(Unauthorized):
    """The request has no token."""

    challenge = "Bearer"

    def get_headers(self, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Return the headers of the response, with the challenge (RFC 6750, section 3)."""
        return [*super().get_headers(*args, **kwargs), ("WWW-Authenticate", self.challenge)]


class InvalidToken(AuthenticationRequired):
    """The token of the request is invalid. The response is always the same: it does not tell what was wrong."""

    kind = INVALID_BEARER
    challenge = f'Bearer error="{INVALID_BEARER}", error_description="{OTHER_KINDS[INVALID_BEARER][1]}"'


class KeysUnavailable(ServiceUnavailable):
    """There are no keys now that could verify the token of the request."""

    kind = KEYS_UNAVAILABLE

    def __init__(self) -> None:
        """Create the error."""
        super().__init__(retry_after=RETRY_AFTER)


class Draining(ServiceUnavailable):
    """The service is about to stop. Only the check of its readiness gets this error."""

    kind = DRAINING

    def __init__(self) -> None:
        """Create the error."""
        super().__init__(retry_after=RETRY_AFTER)


class VersionMismatch(PreconditionFailed):
    """If-Match names other versions than the current one."""

    def __init__(self, etag: str) -> None:
        """Create the error. ``etag`` is the current ETag of the task."""
        super().__init__(f"{KINDS[412][1]}; it is at {etag}")
        self.etag = etag

    def get_headers(self, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Return the headers of the response, with the ETag."""
        return [*super().get_headers(*args, **kwargs), ("ETag", self.etag)]


def init_app(app: Flask) -> None:
    """Register the error handlers. They replace flask-smorest's, which would drop headers such as Allow."""
    app.register_error_handler(HTTPException, problem_response)
    app.register_error_handler(
        UnavailableError, lambda _: problem_response(ServiceUnavailable(retry_after=RETRY_AFTER))
    )
    app.register_error_handler(InvalidValueError, lambda _: problem_response(MalformedRequest()))


def problem_response(error: HTTPException) -> Response:
    """Return the response for an HTTP error: a problem, with the headers of the error (Allow, ETag, Retry-After)."""
    status = error.code or 500
    kind, detail = kind_of(status)
    if kind_of_error := getattr(error, "kind", ""):
        kind, (_, detail) = kind_of_error, OTHER_KINDS[kind_of_error]
    errors = error.errors if isinstance(error, InvalidRequest) else []
    if error.description != type(error).description:  # Werkzeug's own descriptions are attributes of the classes
        detail = error.description or detail
    instance = quote(request.root_path + request.path, safe="/:@!$&'()*+,;=~")
    response = Response(
        json.dumps(problem(status, kind, detail, instance, errors)), status=status, content_type=MEDIA_TYPE
    )
    response.headers.extend((name, value) for name, value in error.get_headers() if name != "Content-Type")
    return response


def kind_of(status: int) -> tuple[str, str]:
    """Return the type of the problem for an HTTP status, and the default detail."""
    if status in KINDS:
        return KINDS[status]
    reason = HTTP_STATUS_CODES.get(status, "Unknown Error")  # http.HTTPStatus differs between versions of Python
    return reason.lower().replace(" ", "_").replace("-", "_"), reason


def problem(
    status: int, kind: str, detail: str, instance: str, errors: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
    """Return the JSON object of a problem."""
    fields: dict[str, Any] = {
        "type": kind,
        "title": kind.replace("_", " ").title(),
        "status": status,
        "detail": detail,
        "instance": instance,
    }
    if errors:
        fields["errors"] = list(errors)
    return fields


def field_errors(messages: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the errors of a problem. ``messages`` are webargs': ``{location: {field: [detail, ...]}}``."""
    return [
        ({"parameter": name} if location == "query" else {"pointer": _pointer(name)}) | {"detail": detail}
        for location, fields in messages.items()
        for name, details in sorted(fields.items())  # marshmallow lists unknown fields in no particular order
        for detail in details
    ]


def _pointer(name: str) -> str:
    return "#/" + quote(name.replace("~", "~0").replace("/", "~1"), safe="~")  # a URI fragment: RFC 6901, section 6
