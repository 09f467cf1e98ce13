"""The user of a request: the user of its token, or the one user of the settings if there are no tokens."""

import re
from collections.abc import Callable

from flask import Flask, Response, g, request

from todo_api.api.middleware import USER
from todo_api.api.problems import AuthenticationRequired, InvalidToken, KeysUnavailable, MalformedRequest
from todo_api.tokens import InvalidTokenError, KeysUnavailableError

# RFC 6750, section 2.1. A server joins two headers with a comma, which no token has.
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.ASCII | re.IGNORECASE)


def init_app(app: Flask, user_id: str, verify: Callable[[str], str] | None) -> None:
    """Register the hooks that find out who asks.

    If there is a function to ``verify`` tokens, every request under /api needs a token. That includes routes that are
    added later, and URLs that do not exist. If there is none, ``user_id`` is the user of every request.
    """

    @app.before_request
    def identify() -> None:
        if verify is None:
            g.user_id = user_id
        elif _is_api() and request.method != "OPTIONS":  # a browser sends no token in a preflight request
            g.user_id = request.environ[USER] = _user_of_token(verify)

    @app.after_request
    def vary(response: Response) -> Response:
        if verify and _is_api():
            response.headers.add("Vary", "Authorization")
        return response


def current_user() -> str:
    """Return the id of the user who owns the tasks that this request can use."""
    user_id: str = g.user_id
    return user_id


def _is_api() -> bool:
    return f"{request.path}/".startswith("/api/")


def _user_of_token(verify: Callable[[str], str]) -> str:
    given = request.environ.get("HTTP_AUTHORIZATION")
    if given is None:
        raise AuthenticationRequired
    if not (bearer := _BEARER.fullmatch(given)):
        raise MalformedRequest("There must be one Authorization header, with a bearer token")
    try:
        return verify(bearer[1])
    except InvalidTokenError:
        raise InvalidToken from None
    except KeysUnavailableError:
        raise KeysUnavailable from None
