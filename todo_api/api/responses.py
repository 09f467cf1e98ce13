"""Responses to successful requests: JSON as PostgreSQL wrote it, with an ETag."""

from http import HTTPStatus
from typing import TYPE_CHECKING

from flask import Response
from werkzeug.datastructures import Headers

from todo_api.api import conditions

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# A browser caches the response, and asks each time whether it is current.
_CACHE_CONTROL = "private, no-cache"


class JsonResponse(Response):
    """A response with a JSON body. It sets all of its headers itself."""

    def __init__(self, json: bytes, status: int = 200, etag: str = "") -> None:
        """Create the response. ``json`` is the body."""
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(json)))]
        if etag:
            headers += [("ETag", etag), ("Cache-Control", _CACHE_CONTROL)]
        super().__init__([json], status, headers, direct_passthrough=True)

    def get_wsgi_headers(self, environ: "WSGIEnvironment") -> Headers:
        """Return the headers unchanged, or without those of the body if the status is 304."""
        return self.headers if self.status_code != HTTPStatus.NOT_MODIFIED else super().get_wsgi_headers(environ)


def task_response(task: bytes, status: int = 200) -> Response:
    """Return a response with a task and its ETag."""
    return JsonResponse(task, status, conditions.task_etag(task))


def list_response(tasks: bytes, cursor: str) -> Response:
    """Return a response with a page of tasks and its ETag. ``cursor`` is that of the next page, or empty."""
    return JsonResponse(tasks, etag=conditions.list_etag(tasks, cursor))


def or_not_modified(response: Response) -> Response:
    """Return the response, or a 304 without a body if the client has the response already."""
    if conditions.client_has(response.headers["ETag"]):
        response.status_code = HTTPStatus.NOT_MODIFIED  # then Werkzeug omits the body and its headers
    return response
