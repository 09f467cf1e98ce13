"""Whether the process lives, and whether it can reach the database."""

from flask import Blueprint, Flask

from todo_api.api.current import database
from todo_api.api.responses import JsonResponse

blueprint = Blueprint("health", __name__)


def init_app(app: Flask) -> None:
    """Add the routes to the application."""
    app.register_blueprint(blueprint)


@blueprint.get("/healthz")
def live() -> JsonResponse:
    """Answer that the process lives. This needs no database."""
    return JsonResponse(b'{"status": "ok"}')


@blueprint.get("/readyz")
def ready() -> JsonResponse:
    """Answer that the database can be reached, or else with a 503 problem."""
    database.fetch_json("database/ready")
    return JsonResponse(b'{"status": "ready"}')
