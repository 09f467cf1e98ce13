"""Connection strings, and databases for one test."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support import pgbouncer
from tests.support.environment import POOLER


def as_url(conninfo: str) -> str:
    """Return a connection string as a URL for DATABASE_URL. If TEST_POOLER is set, the URL leads through PgBouncer."""
    if POOLER:
        conninfo = pgbouncer.shared(make_conninfo(conninfo, dbname=None)).in_front_of(conninfo)
    return f"postgresql://?{urlencode(conninfo_to_dict(conninfo), quote_via=quote)}"


def administrator(conninfo: str) -> str:
    """Return the connection string of a role that may create databases: the embedded server's role may not."""
    return conninfo if os.environ.get("TEST_DATABASE_URL") else make_conninfo(conninfo, user="postgres")


@contextmanager
def new_database(conninfo: str) -> Iterator[str]:
    """Create an empty database on the same server, owned by the same role. Drop it at the end of the block."""
    name = f"todo_test_{uuid.uuid4().hex}"
    role = conninfo_to_dict(conninfo)["user"]
    with psycopg.connect(administrator(conninfo), autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(str(role)))
        )
        yield make_conninfo(conninfo, dbname=name)
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
