"""Reads the body of a request, and parses it as strict JSON (RFC 8259)."""

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from flask import Flask, current_app, g, request
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType
from werkzeug.http import parse_options_header

from todo_api.api.problems import InvalidRequest, MalformedRequest

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"  # RFC 7396

_CHUNK = 64 * 1024  # bytes
_DISCARDED_CHUNKS = 16  # of a body that is too large
# PostgreSQL's text cannot hold these, though JSON can spell them: NUL, and a lone surrogate.
_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")


def init_app(app: Flask) -> None:
    """Read the body of each request before its view runs.

    A body that a view leaves unread would stay on the connection, in front of the client's next request.
    """

    @app.before_request
    def read_body() -> None:
        g.body = read(request.environ, current_app.config["MAX_CONTENT_LENGTH"])


def read(environ: "WSGIEnvironment", limit: int) -> bytes:
    """Return the whole body, empty if there is none. ``limit`` is in bytes.

    Werkzeug's stream would cut a chunked body at the limit, and accept one that ends too early.

    Raises:
        RequestEntityTooLarge: the body is over the limit.
        MalformedRequest: the body did not arrive whole.

    """
    length = _content_length(environ)
    if length is None and "HTTP_TRANSFER_ENCODING" not in environ:
        return b""
    if length is not None and length > limit:
        raise _too_large(environ, limit)
    try:
        # One byte more than the limit shows whether a chunked body goes on after it.
        data: bytes = environ["wsgi.input"].read(limit + 1 if length is None else length)
    except Exception as error:  # the WSGI specification does not say what a server raises
        raise MalformedRequest("The body did not arrive whole") from error
    if len(data) > limit:
        raise _too_large(environ, limit)
    if len(data) < (length or 0):
        raise MalformedRequest("The body is shorter than its Content-Length")
    return data


def _content_length(environ: "WSGIEnvironment") -> int | None:
    digits: str = environ.get("CONTENT_LENGTH", "")
    return int(digits) if digits.isdecimal() and digits.isascii() else None


def _too_large(environ: "WSGIEnvironment", limit: int) -> RequestEntityTooLarge:
    """Return the error for a body over the limit, after discarding some more of the body.

    If much of it is unread when the connection closes, the connection is reset, and the client may not get the answer.
    """
    with suppress(Exception):
        for _ in range(_DISCARDED_CHUNKS):
            if not environ["wsgi.input"].read(_CHUNK):
                break
    return RequestEntityTooLarge(f"The body is larger than {limit} bytes")


def json_object() -> dict[str, Any]:
    """Return the JSON object in the body of the current request.

    Raises:
        UnsupportedMediaType: the body is not JSON by its Content-Type.
        MalformedRequest: there is no body, or it is not strict JSON.
        InvalidRequest: the JSON is not an object.

    """
    if not g.body:
        raise MalformedRequest("The request has no body; it must be a JSON object")
    accepted = [JSON, MERGE_PATCH] if request.method == "PATCH" else [JSON]
    mimetype, _ = parse_options_header(request.environ.get("CONTENT_TYPE"))
    encoding = request.environ.get("HTTP_CONTENT_ENCODING", "").lower()
    if mimetype.lower() not in accepted or encoding not in {"", "identity"}:
        raise UnsupportedMediaType(f"The body must be {' or '.join(accepted)}, without a Content-Encoding")
    value = parse(g.body)
    if not isinstance(value, dict):
        raise InvalidRequest([{"pointer": "#", "detail": "The body must be a JSON object"}])
    return value


def parse(data: bytes) -> Any:
    """Parse JSON in UTF-8 strictly: without NaN, without duplicate names, without text that PostgreSQL cannot hold.

    Raises:
        MalformedRequest: it is not that.

    """
    try:
        return _DECODER.decode(data.decode())
    except RecursionError as error:
        raise MalformedRequest("The body is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise MalformedRequest("The body is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise MalformedRequest(f"The body is not JSON: {error}") from error


def _reject_constant(name: str) -> NoReturn:
    raise MalformedRequest(f"The body is not JSON: it contains {name}")


def _checked_object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(members)
    if len(value) < len(members):
        raise MalformedRequest("The body has a name twice in one object")
    if any(isinstance(text, str) and _NOT_TEXT.search(text) for member in members for text in member):
        raise MalformedRequest("The body has a NUL or a lone surrogate in a string")
    return value


_DECODER = json.JSONDecoder(
    # No field is a number, so that a number need not be exact; and int() rejects 5000 digits.
    parse_int=float,
    parse_constant=_reject_constant,
    object_pairs_hook=_checked_object,
)
