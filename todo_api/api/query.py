"""Strict parsing of the query of a URL: invalid UTF-8 and repeated parameters are rejected."""

from urllib.parse import parse_qsl

from flask import request

from todo_api.api.problems import InvalidRequest, MalformedRequest


def parameters() -> dict[str, str]:
    """Return the query parameters of the current request.

    Raises:
        MalformedRequest: the query is not UTF-8.
        InvalidRequest: a parameter is repeated.

    """
    try:
        pairs = parse_qsl(request.query_string.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError as error:
        raise MalformedRequest("The query is not UTF-8") from error
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted(name for name in found if names.count(name) > 1)
        raise InvalidRequest([{"parameter": name, "detail": "The parameter is repeated"} for name in repeated])
    return found
