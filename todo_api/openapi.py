"""The OpenAPI document, which flask-smorest writes from the blueprints and the schemas."""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import flask_smorest
from apispec import BasePlugin
from flask import Flask, Response
from werkzeug.exceptions import HTTPException

from todo_api import problems, schemas
from todo_api.blueprint import Blueprint, View

_INFO = {
    "summary": "Tasks over PostgreSQL.",
    "description": "Every failure is an `application/problem+json` answer (RFC 9457). Every answer carries "
    "`X-Request-ID`: the request's own, where it has a sane one.",
    "contact": {"name": "The maintainers"},
    "license": {"name": "None granted yet", "identifier": "LicenseRef-none"},
}
# Their examples stand in the text: what is in "example", Swagger UI fills in and sends.
_REQUEST_HEADERS = {
    "If-None-Match": (
        (
            'ETags of answers that the client has, such as `"1"`; where one of them is still good, the answer is a 304 '
            "without a body."
        ),
        {"type": "string"},
    ),
    "If-Match": (
        (
            'ETags of versions of the task, such as `"1"`, or `*` for any; at another version the task stays as it '
            "is, and the answer is a 412."
        ),
        {"type": "string"},
    ),
    "Idempotency-Key": (
        (
            "The client's name for this request, such as a UUID. Sent again with the same body it gets the first "
            "answer again, for 24 hours at least, and creates nothing more; with another body it gets a 422."
        ),
        {"type": "string", "minLength": 1, "maxLength": 255},
    ),
}
_ANSWER_HEADERS = {
    "ETag": ("The task's version, for If-Match and If-None-Match.", {"type": "string"}, '"1"'),
    "ETag of a list": (
        "Changes with whatever the list shows; weak, so for If-None-Match only.",
        {"type": "string"},
        'W/"190-5d1c2f0a-"',
    ),
    "Cache-Control": (
        "A browser keeps the answer, and asks each time whether it is still good.",
        {"type": "string"},
        "private, no-cache",
    ),
    "Link": (
        'The next page, as a relative reference (RFC 8288) with rel="next"; absent on the last one.',
        {"type": "string"},
        '</api/tasks?limit=50&after=1768123800123456_42>; rel="next"',
    ),
    "Location": ("Where the task is.", {"type": "string", "format": "uri-reference"}, "/api/tasks/42"),
    "Retry-After": ("In how many seconds a retry makes sense.", {"type": "integer"}, problems.RETRY_AFTER),
    "X-Request-ID": ("The request's id, which the log has, too.", {"type": "string"}, "9f1c0f5e"),
}

INVALID_QUERY = "invalid_query"
_INVALID_BODY = "invalid_body"
_VALIDATION_ERRORS = {
    INVALID_QUERY: {"parameter": "limit", "detail": "Limit must be between 1 and 10000"},
    _INVALID_BODY: {"pointer": "#/title", "detail": "Title exceeds maximum length of 200 characters"},
}
_MALFORMED = {INVALID_QUERY: "The query is not UTF-8", _INVALID_BODY: "The body did not arrive whole"}
_DETAILS: dict[int, str] = {404: "No such task"}


class Api(flask_smorest.Api):
    """flask-smorest's API, with problems for failures."""

    ERROR_SCHEMA = schemas.Problem
    DEFAULT_ERROR_RESPONSE_NAME = None  # each call lists its own failures

    def handle_http_exception(self, error: HTTPException) -> Response:
        """Answer with a problem; flask-smorest's own answer would drop headers such as Allow."""
        return problems.answer(error)


class _Finish(BasePlugin):
    """Adds what flask-smorest leaves out or would replace: after it, as plugins run in their order."""

    def path_helper(
        self, path: Any = None, operations: Any = None, parameters: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        """Describe the path's parameter."""
        del path, operations, kwargs
        for parameter in parameters or []:
            parameter["description"] = "The task's id."

    def operation_helper(self, path: Any = None, operations: dict[Any, Any] | None = None, **kwargs: Any) -> None:
        """Add the request headers that a call takes, and put its texts and answers in order."""
        del path, kwargs
        for operation in (operations or {}).values():
            for name in operation.pop("x-takes", []):
                operation.setdefault("parameters", []).append(_request_header(name))
            operation["summary"] = operation["summary"].rstrip(".")
            operation["description"] = operation["description"].replace("\n", " ")  # the source's line breaks
            # In order: success first, as people read.
            operation["responses"] = dict(sorted(operation.get("responses", {}).items(), key=lambda item: int(item[0])))


def documented(*statuses: int | str, takes: Sequence[str] = (), **operation: Any) -> Callable[[View], View]:
    """Add to a call's documentation: its name, its other statuses, the request headers it takes, and what is given.

    A 400 is for a body; a query's is ``INVALID_QUERY``.
    """

    def decorate(view: View) -> View:
        responses = {status: _name(status) for status in statuses if isinstance(status, int)}
        if INVALID_QUERY in statuses:
            responses[400] = INVALID_QUERY
        manual = {"operationId": view.__name__, "responses": responses, "x-takes": list(takes), **operation}
        described: View = Blueprint.doc(**manual)(view)
        return described

    return decorate


def answers_with(*names: str) -> dict[str, Any]:
    """Document the headers of an answer; each has X-Request-ID."""
    return {name.partition(" ")[0]: _answer_header(name) for name in (*names, "X-Request-ID")}


def init_app(app: Flask) -> Api:
    """Give the application its document, at /openapi.json."""
    app.config.update(
        API_TITLE="todo API",
        API_VERSION="1.0.0",
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/",
        OPENAPI_JSON_PATH="openapi.json",
    )
    # No call asks who is calling, yet.
    spec = {"info": _INFO, "servers": [{"url": "/"}], "security": [], "extra_plugins": [_Finish()]}
    api = Api(app, spec_kwargs=spec)
    api.spec.components.schemas.pop("PaginationMetadata", None)  # flask-smorest's, whether used or not
    not_modified = answers_with("ETag", "Link", "Cache-Control")
    known = {"description": "What the client has is still good", "headers": not_modified}
    api.spec.components.response(_name(304), known, lazy=True)
    for status, (kind, detail) in problems.KINDS.items():
        api.spec.components.response(_name(status), _failure(status, {kind: (detail, [])}), lazy=True)
    malformed, _ = problems.KINDS[400]
    for name, error in _VALIDATION_ERRORS.items():
        problems_of_400 = {"validation_error": (error["detail"], [error]), malformed: (_MALFORMED[name], [])}
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
    """Document a failure: an example of each problem it can be, from its detail and errors, and its headers."""
    instance = "/api/tasks/42" if status in {HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED} else "/api/tasks"
    examples = {
        kind: {"value": problems.body(status, kind, _DETAILS.get(status, detail), instance, errors)}
        for kind, (detail, errors) in kinds.items()
    }
    headers = {HTTPStatus.SERVICE_UNAVAILABLE: ["Retry-After"], HTTPStatus.PRECONDITION_FAILED: ["ETag"]}
    return {
        "description": HTTPStatus(status).phrase,
        "headers": answers_with(*headers.get(HTTPStatus(status), [])),
        "content": {problems.MEDIA_TYPE: {"schema": schemas.Problem, "examples": examples}},
    }
