"""Reads a request's body as strict JSON (RFC 8259) and hands it to webargs, which has the schema check it."""

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qsl

from flask import Request, current_app
from gunicorn.http.errors import ParseException
from marshmallow import RAISE, Schema, ValidationError
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType
from werkzeug.http import parse_options_header

from todo_api.problems import MalformedRequest, ValidationFailed, violations

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"  # RFC 7396


class Parser(FlaskParser):
    """webargs' parser with strict JSON, unknown query parameters refused, and problems for answers."""

    DEFAULT_VALIDATION_STATUS = 400
    DEFAULT_UNKNOWN_BY_LOCATION = {
        **FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION,
        "query": RAISE,
    }

    def load_json(self, req: Request, _schema: Schema) -> Any:
        """Give the body's JSON object."""
        body = parse(read(req.environ, current_app.config["MAX_CONTENT_LENGTH"]))
        if not isinstance(body, dict):
            raise ValidationFailed([{"pointer": "#", "detail": "The body must be a JSON object"}])
        return body

    def load_querystring(self, req: Request, _schema: Schema) -> dict[str, str]:
        """Give the query's parameters; none may come twice, and none is changed so that it fits."""
        try:
            pairs = parse_qsl(req.query_string.decode(), keep_blank_values=True, errors="strict")
        except UnicodeDecodeError as error:
            raise MalformedRequest("The query is not UTF-8") from error
        parameters = dict(pairs)
        if len(parameters) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted(name for name in parameters if names.count(name) > 1)
            raise ValidationFailed([{"parameter": name, "detail": "Given more than once"} for name in twice])
        return parameters

    def handle_error(self, error: ValidationError, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise what the schema refused as a problem."""
        raise ValidationFailed(violations(error.messages_dict)) from error


_PIECE = 64 * 1024
_DISCARDED = 16 * _PIECE  # bytes of a body that is too large; who sends more finds the connection closed
# What a PostgreSQL text cannot hold though JSON can spell it: NUL, and half a surrogate pair.
_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")


def read(environ: "WSGIEnvironment", limit: int) -> bytes:
    """Read a JSON body, whole; out of the environ, since Flask's ways to what is in it took 10 us.

    Raises:
        UnsupportedMediaType: it is something else than JSON.
        RequestEntityTooLarge: it is over the limit, chunked or not.
        MalformedRequest: there is none, or the connection brought less than was announced, or a broken chunk.

    """
    data = _read_whole(environ, limit)
    if not data:
        raise MalformedRequest("The request has no body; it takes a JSON object")
    accepted = [JSON, MERGE_PATCH] if environ["REQUEST_METHOD"] == "PATCH" else [JSON]
    mimetype, _ = parse_options_header(environ.get("CONTENT_TYPE"))
    encoding = environ.get("HTTP_CONTENT_ENCODING", "").lower()
    if mimetype.lower() not in accepted or encoding not in {"", "identity"}:
        raise UnsupportedMediaType(f"The body must be {' or '.join(accepted)}, without a Content-Encoding")
    return data


def _read_whole(environ: "WSGIEnvironment", limit: int) -> bytes:
    # Not through werkzeug's stream: it cuts a chunked body at the limit, and takes a truncated one for whole.
    length = announced(environ)  # the middleware has held it against the limit
    if length is None and not environ.get("wsgi.input_terminated"):
        return b""
    try:
        # One byte more than the limit tells a chunked body that ends there from one that goes on.
        data: bytes = environ["wsgi.input"].read(limit + 1 if length is None else length)
    except (OSError, ParseException) as error:
        raise MalformedRequest("The body did not arrive whole") from error
    if len(data) > limit:
        raise too_large(environ, limit)
    if len(data) < (length or 0):
        raise MalformedRequest("The body is shorter than its Content-Length")
    return data


def announced(environ: "WSGIEnvironment") -> int | None:
    """Give a body's Content-Length; None for a chunked body, or none."""
    digits: str = environ.get("CONTENT_LENGTH", "")
    return int(digits) if digits.isdecimal() and digits.isascii() else None


def too_large(environ: "WSGIEnvironment", limit: int) -> RequestEntityTooLarge:
    """Refuse a body that is over the limit, after reading some more of it.

    A connection that closes with much of a body unread is reset, and the client may never see the answer.
    """
    with suppress(OSError, ParseException):
        for _ in range(_DISCARDED // _PIECE):
            if not environ["wsgi.input"].read(_PIECE):
                break
    return RequestEntityTooLarge(f"The body is larger than {limit} bytes")


def parse(data: bytes) -> Any:
    """Parse JSON text, strictly: UTF-8, no NaN, no name twice, nothing that PostgreSQL's text cannot hold.

    Raises:
        MalformedRequest: it is not that.

    """
    try:
        return _STRICT.decode(data.decode())
    except RecursionError as error:
        raise MalformedRequest("The body is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise MalformedRequest("The body is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise MalformedRequest(f"The body is not JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedRequest(f"The body is not JSON: it has {name}")


def _checked_object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(members)
    if len(value) < len(members):
        raise MalformedRequest("The body names a member twice")
    if any(isinstance(text, str) and _NOT_TEXT.search(text) for member in members for text in member):
        raise MalformedRequest("The body has a NUL or a lone surrogate in a string")
    return value


_STRICT = json.JSONDecoder(
    # A number is wrong wherever it stands, so it need not be exact, and int() refuses 5000 digits.
    parse_int=float,
    parse_constant=_refuse_constant,
    object_pairs_hook=_checked_object,
)
