"""A bare WSGI application with gunicorn and a psycopg pool that runs the same statements.

It does not check input, does not log, and does not handle errors.
"""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg_pool import ConnectionPool

from todo_api.api import pages
from todo_api.database import statements
from todo_api.database.connection import OPTIONS

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

SQL = statements.load()
USER = {"user_id": "local"}
FIRST_PAGE = USER | {"limit": 10_000, "completed": "", "q": "", "after": pages.FIRST_CURSOR}


class AsBytes(Loader):
    """A loader that returns JSON as the bytes that PostgreSQL sent."""

    def load(self, data: Buffer) -> bytes:
        """Return a copy of the bytes."""
        return bytes(data)


def configure(connection: psycopg.Connection[Any]) -> None:
    """Register the loader on a new connection."""
    for name in ("json", "text"):
        connection.adapters.register_loader(name, AsBytes)


pool = ConnectionPool(
    os.environ["DATABASE_URL"],
    min_size=4,
    configure=configure,
    kwargs={"autocommit": True, "prepare_threshold": 0, "options": OPTIONS, "cursor_factory": psycopg.RawCursor},
    open=False,
)


def fetch(name: str, parameters: dict[str, Any]) -> bytes:
    """Run a statement and return its JSON."""
    if pool.closed:
        pool.open()
    statement = SQL[name]
    text = statement.rows_json if name == "tasks/list" else statement.row_json
    with pool.connection() as connection:
        rows = connection.execute(text, [parameters[name] for name in statement.parameters]).fetchall()
    if name == "tasks/list":
        return b"[" + statements.SEPARATOR.join(array[1:-1] for array, _ in rows) + b"]"
    return rows[0][0] if rows else b"null"


def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    """Respond to one of the six calls."""
    method, parts = environ["REQUEST_METHOD"], environ["PATH_INFO"].split("/")  # "", "api", "tasks", id, "toggle"
    task = USER | {"task_id": parts[3], "if_match": "{}"} if len(parts) > 3 else USER
    if len(parts) == 3 and method == "GET":
        body = fetch("tasks/list", FIRST_PAGE | dict(parse_qsl(environ["QUERY_STRING"])))
    elif len(parts) == 3:
        body = fetch("tasks/create", USER | {"task": read(environ)})
    elif len(parts) == 5:
        body = fetch("tasks/toggle", task)
    elif method == "PATCH":
        body = fetch("tasks/update", task | {"changes": read(environ)})
    else:
        body = fetch("tasks/get" if method == "GET" else "tasks/delete", task)
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def read(environ: "WSGIEnvironment") -> str:
    """Return the body of a request."""
    body: bytes = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    return body.decode()
