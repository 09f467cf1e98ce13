"""Health checks: whether the process is alive, and whether the service is ready for requests."""

from flask import Blueprint, Flask

from todo_api import draining
from todo_api.api.current_database import database
from todo_api.api.problems import Draining
from todo_api.api.responses import JsonResponse

blueprint = Blueprint("health", __name__)


def init_app(app: Flask) -> None:
    """Add the routes to the application."""
    app.register_blueprint(blueprint)


@blueprint.get("/healthz")
def live() -> JsonResponse:
    """Return 200. This needs no database."""
    return JsonResponse(b'{"status": "ok"}')


@blueprint.get("/readyz")
def ready() -> JsonResponse:
    """Return 200 if the database can be reached and has the tables, otherwise a problem.

    A service that is about to stop returns a problem too, so that load balancers send it no more requests.
    """
    if draining.is_active():
        raise Draining
    database.fetch_json("database/ready")  # raises an error otherwise
    return JsonResponse(b'{"status": "ready"}')
