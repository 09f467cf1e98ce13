"""Whether the process lives, and whether it can reach the database."""

from flask import Blueprint, Response

from todo_api import database

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def live() -> Response:
    """Say that the process lives; this needs no database."""
    return Response('{"status": "ok"}', mimetype="application/json")


@blueprint.get("/readyz")
def ready() -> Response:
    """Say that the database can be reached; a 503 problem otherwise."""
    database.fetch_json("database/ready")
    return Response('{"status": "ready"}', mimetype="application/json")
