"""The answers to successful requests: JSON as PostgreSQL wrote it, with its ETag."""

from flask import Response

from todo_api.api import conditions

# A browser keeps the answer, and asks each time whether it is still current.
_CACHE_CONTROL = "private, no-cache"


class JsonResponse(Response):
    """A JSON document."""

    default_mimetype = "application/json"


def task_response(task: bytes, status: int = 200) -> Response:
    """Return a response with a task and its ETag."""
    return _with_etag(JsonResponse(task, status), conditions.task_etag(task))


def list_response(tasks: bytes, cursor: str) -> Response:
    """Return a response with a page of tasks and its ETag. ``cursor`` is the next page's, or empty."""
    return _with_etag(JsonResponse(tasks), conditions.list_etag(tasks, cursor))


def unless_current(response: Response) -> Response:
    """Return the response to a GET request, as a 304 without a body if the client has it already."""
    if conditions.has_current(response.headers["ETag"]):
        response.status_code = 304  # Werkzeug then leaves out the body and its headers
    return response


def _with_etag(response: Response, etag: str) -> Response:
    response.headers["ETag"] = etag
    response.headers["Cache-Control"] = _CACHE_CONTROL
    return response
