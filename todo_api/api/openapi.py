"""The OpenAPI document, which flask-smorest generates from the blueprints and the schemas."""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import flask_smorest
from apispec import BasePlugin
from flask import Flask

from todo_api.api import problems, schemas
from todo_api.api.blueprint import Blueprint

View = TypeVar("View", bound=Callable[..., Any])

_INFO = {
    "summary": "Tasks over PostgreSQL.",
    "description": "Every failure is answered with `application/problem+json` (RFC 9457). Every answer has an "
    "`X-Request-ID`: the request's own if that is valid, or else a new one.",
    "contact": {"name": "The maintainers"},
    "license": {"name": "None granted yet", "identifier": "LicenseRef-none"},
}
# The examples are in the text, because Swagger UI would fill in and send an "example".
_REQUEST_HEADERS = {
    "If-None-Match": (
        (
            'ETags of answers that the client has, such as `"1"`. If one of them is current, the answer is a 304 '
            "without a body."
        ),
        {"type": "string"},
    ),
    "If-Match": (
        (
            'ETags of versions of the task, such as `"1"`, or `*` for any version. If the task is at another version, '
            "it is not changed, and the answer is a 412."
        ),
        {"type": "string"},
    ),
    "Idempotency-Key": (
        (
            "The client's own key for this request, such as a UUID. For at least 24 hours, a request with the same "
            "key and the same body gets the first answer again and creates no task; with another body it gets a 422."
        ),
        {"type": "string", "minLength": 1, "maxLength": 255},
    ),
}
_ANSWER_HEADERS = {
    "ETag": ("The task's version, for If-Match and If-None-Match.", {"type": "string"}, '"1"'),
    "ETag of a list": (
        "Changes if the page or its link changes. It is weak, so that it is for If-None-Match only.",
        {"type": "string"},
        'W/"190-5d1c2f0a-"',
    ),
    "Cache-Control": (
        "A browser keeps the answer, and asks each time whether it is current.",
        {"type": "string"},
        "private, no-cache",
    ),
    "Link": (
        'The next page, as a relative reference (RFC 8288) with rel="next"; absent on the last one.',
        {"type": "string"},
        '</api/tasks?limit=50&after=1768123800123456_42>; rel="next"',
    ),
    "Location": ("The URL of the task.", {"type": "string", "format": "uri-reference"}, "/api/tasks/42"),
    "Retry-After": ("Seconds after which to retry.", {"type": "integer"}, problems.RETRY_AFTER),
    "X-Request-ID": ("The id of the request, which is also in the log.", {"type": "string"}, "9f1c0f5e"),
}

INVALID_QUERY = "invalid_query"
_INVALID_BODY = "invalid_body"
_VALIDATION_ERRORS = {
    INVALID_QUERY: {"parameter": "limit", "detail": "Limit must be between 1 and 10000"},
    _INVALID_BODY: {"pointer": "#/title", "detail": "Title exceeds maximum length of 200 characters"},
}
_MALFORMED = {INVALID_QUERY: "The query is not UTF-8", _INVALID_BODY: "The body did not arrive whole"}
_DETAILS = {404: "No such task", 412: str(problems.VersionMismatch('"1"').description)}


class Api(flask_smorest.Api):
    """flask-smorest's API, which documents failures as problems."""

    ERROR_SCHEMA = schemas.Problem
    DEFAULT_ERROR_RESPONSE_NAME = None  # each call lists its own failures


class _Finish(BasePlugin):
    """Completes what flask-smorest has written. Plugins run in their order, so that this one runs last."""

    def path_helper(
        self, path: Any = None, operations: Any = None, parameters: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        """Describe the parameter of the path."""
        del path, operations, kwargs
        for parameter in parameters or []:
            parameter["description"] = "The id of the task."

    def operation_helper(self, path: Any = None, operations: dict[Any, Any] | None = None, **kwargs: Any) -> None:
        """Add the request headers of a call, and tidy its texts and answers."""
        del path, kwargs
        for operation in (operations or {}).values():
            for name in operation.pop("x-takes", []):
                operation.setdefault("parameters", []).append(_request_header(name))
            operation["summary"] = operation["summary"].rstrip(".")
            operation["description"] = operation["description"].replace("\n", " ")  # the line breaks of the docstring
            # Success comes first.
            operation["responses"] = dict(sorted(operation.get("responses", {}).items(), key=lambda item: int(item[0])))


def documented(*statuses: int | str, takes: Sequence[str] = (), **operation: Any) -> Callable[[View], View]:
    """Document a call: its name, its statuses besides success, and the request headers that it ``takes``.

    400 is for an invalid body, ``INVALID_QUERY`` is the 400 for an invalid query. ``operation`` has any other members
    of the OpenAPI operation.
    """

    def decorate(view: View) -> View:
        responses = {status: _name(status) for status in statuses if isinstance(status, int)}
        if INVALID_QUERY in statuses:
            responses[400] = INVALID_QUERY
        manual = {"operationId": view.__name__, "responses": responses, "x-takes": list(takes), **operation}
        described: View = Blueprint.doc(**manual)(view)
        return described

    return decorate


def answer_headers(*names: str) -> dict[str, Any]:
    """Return the documentation of an answer's headers. Every answer has X-Request-ID."""
    return {name.partition(" ")[0]: _answer_header(name) for name in (*names, "X-Request-ID")}


def init_app(app: Flask) -> Api:
    """Add the document to the application, at /openapi.json."""
    app.config.update(
        API_TITLE="todo API",
        API_VERSION="1.0.0",
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/",
        OPENAPI_JSON_PATH="openapi.json",
    )
    # No call needs authentication yet.
    spec = {"info": _INFO, "servers": [{"url": "/"}], "security": [], "extra_plugins": [_Finish()]}
    api = Api(app, spec_kwargs=spec)
    api.spec.components.schemas.pop("PaginationMetadata", None)  # flask-smorest adds it always
    not_modified = answer_headers("ETag", "Link", "Cache-Control")
    known = {"description": "The client has the current answer", "headers": not_modified}
    api.spec.components.response(_name(304), known, lazy=True)
    for status, (kind, detail) in problems.KINDS.items():
        api.spec.components.response(_name(status), _failure(status, {kind: (detail, [])}), lazy=True)
    malformed, _ = problems.KINDS[400]
    for name, error in _VALIDATION_ERRORS.items():
        problems_of_400 = {problems.VALIDATION_ERROR: (error["detail"], [error]), malformed: (_MALFORMED[name], [])}
        api.spec.components.response(name, _failure(400, problems_of_400), lazy=True)
    return api


def _name(status: int) -> str:
    names = {HTTPStatus.NOT_MODIFIED: "not_modified", HTTPStatus.BAD_REQUEST: _INVALID_BODY}
    return names.get(HTTPStatus(status)) or problems.KINDS[status][0]


def _request_header(name: str) -> dict[str, Any]:
    description, schema = _REQUEST_HEADERS[name]
    return {"in": "header", "name": name, "description": description, "schema": schema}


def _answer_header(name: str) -> dict[str, Any]:
    description, schema, example = _ANSWER_HEADERS[name]
    return {"description": description, "schema": schema, "example": example}


def _failure(status: int, kinds: dict[str, tuple[str, list[dict[str, str]]]]) -> dict[str, Any]:
    """Return the documentation of a failure, with an example of each of its problems and with its headers."""
    instance = "/api/tasks/42" if status in {HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED} else "/api/tasks"
    examples = {
        kind: {"value": problems.problem(status, kind, _DETAILS.get(status, detail), instance, errors)}
        for kind, (detail, errors) in kinds.items()
    }
    headers = {HTTPStatus.SERVICE_UNAVAILABLE: ["Retry-After"], HTTPStatus.PRECONDITION_FAILED: ["ETag"]}
    return {
        "description": HTTPStatus(status).phrase,
        "headers": answer_headers(*headers.get(HTTPStatus(status), [])),
        "content": {problems.MEDIA_TYPE: {"schema": schemas.Problem, "examples": examples}},
    }
