"""Conditional requests (RFC 9110, section 13): a task's version is its ETag."""

import hashlib
import json
import re

from flask import Response, request
from werkzeug.http import quote_etag

_TAG = r'(?:W/)?"[^"]*"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")  # werkzeug's parser takes malformed lists, too
_VERSION = re.compile(r'"[1-9][0-9]{0,17}"')

CACHE = "private, no-cache"  # a browser keeps the answer, and asks each time whether it is still good


def answer(task: bytes, status: int = 200) -> Response:
    """Answer with a task, as PostgreSQL wrote it, and its ETag."""
    headers = {"ETag": etag_of(task), "Cache-Control": CACHE}
    return Response(task, status, headers, mimetype="application/json")


def etag_of(task: bytes) -> str:
    """Give the ETag of a task."""
    return quote_etag(str(json.loads(task)["version"]))


def digest(*parts: bytes | str) -> str:
    """Give what an ETag can be made of, different for what is different."""
    found = hashlib.sha1(usedforsecurity=False)
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def unless_known(response: Response) -> Response:
    """Answer 304 without a body where If-None-Match has the answer's ETag."""
    if "If-None-Match" not in request.headers:  # as in most requests; the parsing of none took 5 % of a read
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
