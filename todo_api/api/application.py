"""A Flask application without async views, sessions and host matching, which this API does not use."""

from collections.abc import Callable
from typing import Any

from flask import Flask, Request, Response, request
from flask.sessions import NullSession, SessionInterface
from werkzeug.exceptions import NotFound
from werkzeug.routing import MapAdapter

from todo_api.api.middleware import REQUEST_ID, TRACE_ID, loggable


class NoSessions(SessionInterface):
    """A session interface whose session is always empty and never saved."""

    session = NullSession()

    def open_session(self, app: Flask, request: Request) -> NullSession:
        """Return the empty session."""
        del app, request
        return self.session


class Application(Flask):
    """Flask's application, without features that took 10 % of the time of a read."""

    session_interface = NoSessions()

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the view unchanged. No view is async."""
        return func

    def log_exception(self, exc_info: Any) -> None:
        """Log a bug: a line of limited length with the id of the request, and the traceback."""
        fields = {"method": request.method, "path": loggable(request.path), "request_id": request.environ[REQUEST_ID]}
        text = " ".join(fields.values())
        if trace_id := request.environ.get(TRACE_ID):
            fields["trace_id"] = trace_id
            text += f" trace_id={trace_id}"
        self.logger.error("Exception on %s", text, exc_info=exc_info, extra={"fields": fields})

    def make_default_options_response(self) -> Response:
        """Return the response to an OPTIONS request. It has no body, so it has no Content-Type."""
        response = super().make_default_options_response()
        del response.headers["Content-Type"]
        return response

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Return an adapter that finds the route by the path alone. No route and no response depends on the Host.

        Raises:
            NotFound: the path begins with two slashes. Werkzeug would find the route of the path with one slash.

        """
        if request is None:
            return None
        if request.environ["PATH_INFO"].startswith("//"):
            raise NotFound
        return self.url_map.bind("", request.root_path, path_info=request.path, default_method=request.method)
