"""The OpenAPI document. flask-smorest generates it from the blueprints and the schemas."""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import flask_smorest
from apispec import BasePlugin
from flask import Flask

from todo_api.api import body, problems, schemas
from todo_api.api.blueprint import Blueprint
from todo_api.config import VERSION

View = TypeVar("View", bound=Callable[..., Any])

_INFO = {
    "summary": "Tasks over PostgreSQL.",
    "description": "Every error is a problem (RFC 9457, `application/problem+json`). Every response has an "
    "`X-Request-ID`: that of the request if it is valid, or else a new one.",
    "contact": {"name": "The maintainers"},
    "license": {"name": "None granted yet", "identifier": "LicenseRef-none"},
}
# The examples are in the texts, because Swagger UI would send an "example".
_REQUEST_HEADERS = {
    "If-None-Match": (
        (
            'ETags of responses that the client has, such as `"1"`. If one of them is current, the response is a 304 '
            "without a body."
        ),
        {"type": "string"},
    ),
    "If-Match": (
        (
            'ETags of versions of the task, such as `"1"`, or `*` for any version. If the task is at another version, '
            "it is not changed, and the response is a 412."
        ),
        {"type": "string"},
    ),
    "Idempotency-Key": (
        (
            "The client's own key for this request, such as a UUID. For at least 24 hours, a request with the same "
            "key and the same body gets the first response again and creates no task. With another body it gets a 422."
        ),
        {"type": "string", "minLength": 1, "maxLength": schemas.MAX_KEY_LENGTH},
    ),
}
_RESPONSE_HEADERS: dict[str, dict[str, Any]] = {
    "ETag": {
        "description": "The version of the task, for If-Match and If-None-Match.",
        "schema": {"type": "string"},
        "example": '"1"',
    },
    "Cache-Control": {
        "description": "A browser caches the response, and asks each time whether it is current.",
        "schema": {"type": "string"},
        "example": "private, no-cache",
    },
    "Link": {
        "description": 'The next page, as a relative URL with rel="next" (RFC 8288). The last page has no Link.',
        "schema": {"type": "string"},
        "example": '</api/tasks?limit=50&after=1768123800123456_42>; rel="next"',
    },
    "Location": {
        "description": "The URL of the task.",
        "schema": {"type": "string", "format": "uri-reference"},
        "example": "/api/tasks/42",
    },
    "Retry-After": {
        "description": "The number of seconds after which to retry.",
        "schema": {"type": "integer"},
        "example": problems.RETRY_AFTER,
    },
    "WWW-Authenticate": {
        "description": "What the request needs (RFC 6750).",
        "schema": {"type": "string"},
        "example": problems.AuthenticationRequired.challenge,
    },
    "X-Request-ID": {
        "description": "The id of the request. The log has it too.",
        "schema": {"type": "string"},
        "example": "9f1c0f5e",
    },
}
LIST_ETAG = {
    "description": "Changes if the page or its Link changes. It is weak: it is for If-None-Match only.",
    "schema": {"type": "string"},
    "example": 'W/"5d1c2f0a9b3e4d7c8a6f1e2b3c4d5e6f-"',
}

# Names of responses. The other responses are named after the types of their problems.
INVALID_QUERY = "invalid_query"
INVALID_BODY = "invalid_body"
UNSUPPORTED_PATCH = "unsupported_patch"
_STATUSES = {INVALID_QUERY: 400, INVALID_BODY: 400, UNSUPPORTED_PATCH: 415}
_VALIDATION_ERRORS = {
    INVALID_QUERY: {"parameter": "limit", "detail": f"Limit must be between 1 and {schemas.MAX_LIMIT}"},
    INVALID_BODY: {
        "pointer": "#/title",
        "detail": f"Title exceeds maximum length of {schemas.MAX_TITLE_LENGTH} characters",
    },
}
_MALFORMED = {INVALID_QUERY: "The query is not UTF-8", INVALID_BODY: "The body is incomplete"}
_DETAILS = {404: "No such task", 412: str(problems.VersionMismatch('"1"').description)}
_SCHEME = "bearerAuth"
_TOKENS = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "A token of the issuer that the service trusts. Its `sub` is the user who owns the tasks. A service "
    "without an issuer has one user, and needs no token.",
}


class Api(flask_smorest.Api):
    """flask-smorest's API, with problems as the schema of errors."""

    ERROR_SCHEMA = schemas.Problem
    DEFAULT_ERROR_RESPONSE_NAME = None  # each endpoint lists its own errors


class _Finish(BasePlugin):
    """A plugin that completes the operations. Plugins run in their order, and this one runs after flask-smorest's."""

    def path_helper(
        self, path: Any = None, operations: Any = None, parameters: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        """Describe the parameter of the path."""
        del path, operations, kwargs
        for parameter in parameters or []:
            parameter["description"] = "The id of the task."

    def operation_helper(self, path: Any = None, operations: dict[Any, Any] | None = None, **kwargs: Any) -> None:
        """Add the request headers of an operation, and format its texts and responses."""
        del path, kwargs
        for operation in (operations or {}).values():
            for name in operation.pop("x-takes", []):
                operation.setdefault("parameters", []).append(_request_header(name))
            # The texts are the docstring of the view, which PYTHONOPTIMIZE=2 removes.
            operation["summary"] = operation.get("summary", "").rstrip(".")
            operation["description"] = operation.get("description", "").replace("\n", " ")
            # Success comes first.
            operation["responses"] = dict(sorted(operation.get("responses", {}).items(), key=lambda item: int(item[0])))


def documented(*statuses: int | str, takes: Sequence[str] = (), **operation: Any) -> Callable[[View], View]:
    """Document an endpoint: its statuses other than success, and the request headers that it ``takes``.

    ``INVALID_BODY`` and ``INVALID_QUERY`` are the 400s of endpoints that read a body or a query, and
    ``UNSUPPORTED_PATCH`` is the 415 of a PATCH. ``operation`` has other fields of the OpenAPI operation.
    """

    def decorate(view: View) -> View:
        responses = {status: _name(status) for status in statuses if isinstance(status, int)}
        responses |= {_STATUSES[name]: name for name in statuses if isinstance(name, str)}
        manual = {"operationId": view.__name__, "responses": responses, "x-takes": list(takes), **operation}
        described: View = Blueprint.doc(**manual)(view)
        return described

    return decorate


def response_headers(*names: str) -> dict[str, Any]:
    """Return the documentation of the headers of a response. Every response has X-Request-ID."""
    return {name: _RESPONSE_HEADERS[name] for name in (*names, "X-Request-ID")}


def init_app(app: Flask, *, needs_token: bool) -> Api:
    """Add the document to the application, at /openapi.json.

    The same client can call a service with tokens and one without. So the document always describes them, and only
    the requirement depends on ``needs_token``.
    """
    app.config.update(
        API_TITLE="todo API",
        API_VERSION=VERSION,
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/",
        OPENAPI_JSON_PATH="openapi.json",
    )
    servers = [{"url": app.config["APPLICATION_ROOT"]}]
    security: list[dict[str, list[str]]] = [{_SCHEME: []}] if needs_token else [{}, {_SCHEME: []}]
    spec = {"info": _INFO, "servers": servers, "security": security, "extra_plugins": [_Finish()]}
    api = Api(app, spec_kwargs=spec)
    api.spec.components.security_scheme(_SCHEME, _TOKENS)
    api.spec.components.schemas.pop("PaginationMetadata", None)  # flask-smorest always adds it
    same_etag = {**_RESPONSE_HEADERS["ETag"], "description": "The same as in the 200."}
    headers = response_headers("Link", "Cache-Control") | {"ETag": same_etag}
    not_modified = {"description": "The client has the current response already", "headers": headers}
    api.spec.components.response(_name(304), not_modified, lazy=True)
    for status, (kind, detail) in problems.KINDS.items():
        kinds: dict[str, tuple[str, list[dict[str, str]]]] = {kind: (detail, [])}
        kinds |= {other: (detail, []) for other, (shared, detail) in problems.OTHER_KINDS.items() if shared == status}
        kinds.pop(problems.VALIDATION_ERROR, None)  # INVALID_QUERY and INVALID_BODY have it
        kinds.pop(problems.DRAINING, None)  # only /readyz has it, which is not in the document
        api.spec.components.response(_name(status), _failure(status, kinds), lazy=True)
    unsupported, _ = problems.KINDS[415]
    patch = _failure(415, {unsupported: (body.UNSUPPORTED_PATCH, [])})
    api.spec.components.response(UNSUPPORTED_PATCH, patch, lazy=True)
    malformed, _ = problems.KINDS[400]
    for name, error in _VALIDATION_ERRORS.items():
        problems_of_400 = {problems.VALIDATION_ERROR: (error["detail"], [error]), malformed: (_MALFORMED[name], [])}
        api.spec.components.response(name, _failure(400, problems_of_400), lazy=True)
    return api


def _name(status: int) -> str:
    return "not_modified" if status == HTTPStatus.NOT_MODIFIED else problems.KINDS[status][0]


def _request_header(name: str) -> dict[str, Any]:
    description, schema = _REQUEST_HEADERS[name]
    return {"in": "header", "name": name, "description": description, "schema": schema}


def _failure(status: int, kinds: dict[str, tuple[str, list[dict[str, str]]]]) -> dict[str, Any]:
    """Return the documentation of an error response, with its headers and with an example of each problem."""
    instance = "/api/tasks/42" if status in {HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED} else "/api/tasks"
    examples = {
        kind: {"value": problems.problem(status, kind, _DETAILS.get(status, detail), instance, errors)}
        for kind, (detail, errors) in kinds.items()
    }
    headers = {
        HTTPStatus.UNAUTHORIZED: ["WWW-Authenticate"],
        HTTPStatus.PRECONDITION_FAILED: ["ETag"],
        HTTPStatus.SERVICE_UNAVAILABLE: ["Retry-After"],
    }
    return {
        "description": HTTPStatus(status).phrase,
        "headers": response_headers(*headers.get(HTTPStatus(status), [])),
        "content": {problems.MEDIA_TYPE: {"schema": schemas.Problem, "examples": examples}},
    }
