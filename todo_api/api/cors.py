"""Cross-origin requests (CORS): pages of other origins can call the API from a browser."""

from collections.abc import Sequence

from flask import Flask, Response, request
from flask_cors import CORS


def init_app(app: Flask, origins: Sequence[str]) -> None:
    """Allow pages of these origins. If there are none, browsers allow only pages of the service's own origin."""
    if not origins:
        return
    CORS(
        app,
        resources="/api/*",
        origins=list(origins),
        methods=["GET", "HEAD", "POST", "PATCH", "DELETE"],
        allow_headers=[
            *("Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match"),
            *("Traceparent", "Tracestate", "X-Request-ID"),  # tracing libraries add the first two
        ],
        expose_headers=["ETag", "Link", "Location", "Retry-After", "WWW-Authenticate", "X-Request-ID"],
        always_send=False,  # send the headers only if the request has an Origin, and name only this origin
        max_age=600,  # seconds for which a browser caches the response to a preflight request
    )

    @app.after_request
    def vary(response: Response) -> Response:
        if request.path.startswith("/api/"):
            response.vary.add("Origin")  # Flask-CORS omits it if there is only one origin
        return response
