"""Lets pages of other origins call the API from a browser (CORS)."""

from collections.abc import Sequence

from flask import Flask
from flask_cors import CORS


def init_app(app: Flask, origins: Sequence[str]) -> None:
    """Allow these origins. Without any, browsers allow only pages of the service's own origin."""
    if not origins:
        return
    CORS(
        app,
        resources="/api/*",
        origins=list(origins),
        methods=["GET", "HEAD", "POST", "PATCH", "DELETE"],
        allow_headers=["Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "X-Request-ID"],
        expose_headers=["ETag", "Link", "Location", "Retry-After", "X-Request-ID"],
        always_send=False,  # only if the request has an Origin, and then with this origin alone
        max_age=600,  # seconds for which a browser remembers the answer to its preflight request
    )
