"""Reading the body of a request, and parsing it as strict JSON (RFC 8259)."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NoReturn

from flask import Flask, Response, g, request
from werkzeug import exceptions
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, UnsupportedMediaType
from werkzeug.http import parse_options_header

from todo_api.api.problems import KINDS, InvalidRequest, MalformedRequest

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"  # RFC 7396
UNSUPPORTED_PATCH = f"{KINDS[415][1]} or {MERGE_PATCH}"

# NUL and lone surrogates. JSON can contain them as escape sequences only, and PostgreSQL's text cannot contain them.
_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")


def init_app(app: Flask) -> None:
    """Register hooks that read the body of each request, before the view runs or after another hook has refused it.

    gunicorn closes the connection after a request whose body was not read, and a view need not read it.
    """

    @app.before_request
    def read_body() -> None:
        g.body = b""
        g.body = read(request.environ, app.config["MAX_CONTENT_LENGTH"])

    @app.after_request
    def discard_body(response: Response) -> Response:
        if response.status_code >= HTTPStatus.BAD_REQUEST and "body" not in g:
            with suppress(HTTPException):  # then the connection is closed
                read(request.environ, app.config["MAX_CONTENT_LENGTH"])
        return response


def read(environ: "WSGIEnvironment", limit: int) -> bytes:
    """Return the whole body, or empty bytes if there is none. ``limit`` is in bytes.

    Werkzeug's stream would truncate a chunked body at the limit, and accept an incomplete body.

    Raises:
        RequestEntityTooLarge: the body is larger than the limit.
        MalformedRequest: the body is incomplete.
        NotImplemented: the body has a transfer coding other than chunked.

    """
    length = _content_length(environ)
    if length is None and "HTTP_TRANSFER_ENCODING" not in environ:
        return b""
    if environ.get("HTTP_TRANSFER_ENCODING", "chunked").strip().lower() != "chunked":
        raise exceptions.NotImplemented  # the body would have to be decompressed
    if length is not None and length > limit:
        raise RequestEntityTooLarge(f"{KINDS[413][1]} of {limit} bytes")
    try:
        # One byte more than the limit shows whether a chunked body is too large.
        data: bytes = environ["wsgi.input"].read(limit + 1 if length is None else length)
    except Exception as error:  # the WSGI specification does not define what a server raises
        raise MalformedRequest("The body is incomplete") from error
    if len(data) > limit:
        raise RequestEntityTooLarge(f"{KINDS[413][1]} of {limit} bytes")
    if len(data) < (length or 0):
        raise MalformedRequest("The body is shorter than its Content-Length")
    return data


def _content_length(environ: "WSGIEnvironment") -> int | None:
    digits: str = environ.get("CONTENT_LENGTH", "")
    return int(digits) if digits.isdecimal() and digits.isascii() else None


def json_object() -> dict[str, Any]:
    """Return the JSON object in the body of the current request.

    Raises:
        UnsupportedMediaType: the Content-Type is not accepted, or the body has a Content-Encoding.
        MalformedRequest: there is no body, or the body is not strict JSON.
        InvalidRequest: the JSON is not an object.

    """
    if not g.body:
        raise MalformedRequest("The request must have a body: a JSON object")
    accepted = [JSON, MERGE_PATCH] if request.method == "PATCH" else [JSON]
    mimetype, _ = parse_options_header(request.environ.get("CONTENT_TYPE"))
    encoding = request.environ.get("HTTP_CONTENT_ENCODING", "").lower()
    if mimetype.lower() not in accepted or encoding not in {"", "identity"}:
        raise UnsupportedMediaType(UNSUPPORTED_PATCH if request.method == "PATCH" else None)
    value = parse(g.body)
    if not isinstance(value, dict):
        raise InvalidRequest([{"pointer": "#", "detail": "The body must be a JSON object"}])
    return value


def parse(data: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        MalformedRequest: the text is not JSON in UTF-8, it is nested too deeply, it contains NaN or Infinity, an object
            has a duplicate name, or a string contains a NUL or a lone surrogate.

    """
    try:
        value = _DECODER.decode(data.decode())
        is_text = b"\\u" not in data or not any(map(_NOT_TEXT.search, _strings(value)))
    except RecursionError as error:
        raise MalformedRequest("The body is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise MalformedRequest("The body is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise MalformedRequest(f"The body is not JSON: {error}") from error
    if not is_text:
        raise MalformedRequest("A string in the body contains a NUL or a lone surrogate")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise MalformedRequest(f"The body is not JSON: it contains {name}")


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, the names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise MalformedRequest("An object in the body has a duplicate name")
    return value


_DECODER = json.JSONDecoder(
    # No field is a number, so numbers need not be exact. int() would reject more than 4300 digits.
    parse_int=float,
    parse_constant=_reject_constant,
    object_pairs_hook=_object,
)
