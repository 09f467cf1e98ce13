"""The docs page: the OpenAPI document in Swagger UI."""

from pathlib import Path

import flask_swagger_ui
from flask import Blueprint, Flask, Response, redirect, send_from_directory, url_for
from werkzeug.wrappers import Response as BaseResponse

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
<noscript>This page needs JavaScript. The OpenAPI document is at <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/page.js"></script>
</body>
</html>
"""
_SCRIPT = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, tryItOutEnabled: true,
  persistAuthorization: false
});
"""


blueprint = Blueprint("docs", __name__)


def init_app(app: Flask) -> None:
    """Add the docs page to the application."""
    app.register_blueprint(blueprint)


@blueprint.get("/")
@blueprint.get("/docs/")
def index() -> BaseResponse:
    """Return a redirect to the docs page."""
    return redirect(url_for("docs.page"))


@blueprint.get("/docs")
def page() -> Response:
    """Return the page that shows the OpenAPI document in Swagger UI."""
    return Response(_PAGE, mimetype="text/html")


@blueprint.get("/docs/page.js")
def script() -> Response:
    """Return the script that starts Swagger UI. It is not inline because the policy forbids inline scripts."""
    return Response(_SCRIPT, mimetype="text/javascript")


@blueprint.get("/docs/<name>")
def asset(name: str) -> Response:
    """Return a file of Swagger UI from its package."""
    return send_from_directory(_ASSETS, name)


@blueprint.after_request
def _restrict(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = _POLICY
    return response
