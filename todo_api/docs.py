"""The OpenAPI document, which flask-smorest writes from the blueprints and schemas, and the page that shows it."""

from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import flask_smorest
import flask_swagger_ui
from flask import Blueprint as FlaskBlueprint
from flask import Flask, Response, redirect, send_from_directory, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as BaseResponse

from todo_api import problems, schemas
from todo_api.json_body import Parser

View = TypeVar("View", bound=Callable[..., Any])

_ASSETS = Path(flask_swagger_ui.__file__).parent / "dist"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>todo API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" type="image/png" href="docs/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript; the document itself is at <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/page.js"></script>
</body>
</html>
"""
_SCRIPT = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, tryItOutEnabled: true
});
"""

_INFO = {
    "description": "Tasks over PostgreSQL. Every failure is an `application/problem+json` answer (RFC 9457).",
}

pages = FlaskBlueprint("docs", __name__)


class Blueprint(flask_smorest.Blueprint):  # type: ignore[misc]
    """flask-smorest's blueprint, with the strict parser."""

    ARGUMENTS_PARSER = Parser()


class Api(flask_smorest.Api):  # type: ignore[misc]
    """flask-smorest's API, with problems for failures."""

    ERROR_SCHEMA = schemas.Problem
    DEFAULT_ERROR_RESPONSE_NAME = None  # each call lists its own failures

    def handle_http_exception(self, error: HTTPException) -> Response:
        """Answer with a problem; flask-smorest's own answer would drop headers such as Allow."""
        return problems.answer(error)


def documented(*failures: int, **operation: Any) -> Callable[[View], View]:
    """Add to a call's documentation: its name, the statuses it can fail with, and what else is given."""

    def decorate(view: View) -> View:
        responses = {status: problems.KINDS[status][0] for status in failures}
        described: View = Blueprint.doc(operationId=view.__name__, responses=responses, **operation)(view)
        return described

    return decorate


def init_app(app: Flask) -> Api:
    """Give the application its document and its page."""
    app.config.update(
        API_TITLE="todo API",
        API_VERSION="1.0.0",
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/",
        OPENAPI_JSON_PATH="openapi.json",
    )
    api = Api(app, spec_kwargs={"info": _INFO, "servers": [{"url": "/"}]})
    api.spec.components.schemas.pop("PaginationMetadata", None)  # flask-smorest's, whether used or not
    for status, (kind, detail) in problems.KINDS.items():
        api.spec.components.response(kind, _failure(status, kind, detail), lazy=True)
    app.register_blueprint(pages)
    return api


def _failure(status: int, kind: str, detail: str) -> dict[str, Any]:
    """Document a failure: its description, an example of each problem it can be, and its headers."""
    examples = {kind: problems.body(status, kind, detail, "/api/tasks")}
    if status == HTTPStatus.BAD_REQUEST:
        errors = {
            "invalid_body": {"pointer": "#/title", "detail": "Title exceeds maximum length of 200 characters"},
            "invalid_query": {"parameter": "colour", "detail": "Unknown parameter"},
        }
        examples |= {
            name: problems.body(status, "validation_error", error["detail"], "/api/tasks", [error])
            for name, error in errors.items()
        }
    if status == HTTPStatus.NOT_FOUND:
        examples[kind] = problems.body(status, kind, "No such task", "/api/tasks/42")
    failure: dict[str, Any] = {
        "description": HTTPStatus(status).phrase,
        "content": {
            problems.MEDIA_TYPE: {
                "schema": schemas.Problem,
                "examples": {name: {"value": example} for name, example in examples.items()},
            }
        },
    }
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        failure["headers"] = {
            "Retry-After": {"description": "Seconds until a retry makes sense.", "schema": {"type": "integer"}}
        }
    return failure


@pages.get("/")
@pages.get("/docs/")
def index() -> BaseResponse:
    """Lead to the docs page."""
    return redirect(url_for("docs.page"))


@pages.get("/docs")
def page() -> Response:
    """Show the document in Swagger UI."""
    return Response(_PAGE, mimetype="text/html")


@pages.get("/docs/page.js")
def script() -> Response:
    """Start Swagger UI: in a file of its own, so that the page needs no inline script."""
    return Response(_SCRIPT, mimetype="text/javascript")


@pages.get("/docs/<name>")
def asset(name: str) -> Response:
    """Serve a file of Swagger UI's from its package."""
    return send_from_directory(_ASSETS, name)


@pages.after_request
def _restrict(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = _POLICY
    return response
