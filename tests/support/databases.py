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
from todo_api.database import apply_migrations, ensure_role

PARTITIONED = bool(os.environ.get("TEST_PARTITIONED"))
PARTITIONS = 8
TABLES = "idempotency_keys", "tasks"


def as_url(conninfo: str) -> str:
    """Return a connection string as a URL for DATABASE_URL. If TEST_POOLER is set, the URL leads through PgBouncer."""
    if POOLER:
        conninfo = pgbouncer.shared(make_conninfo(conninfo, dbname=None)).in_front_of(conninfo)
    return f"postgresql://?{urlencode(conninfo_to_dict(conninfo), quote_via=quote)}"


def yoyo_url(conninfo: str) -> str:
    """Return a connection string as a URL that yoyo's command accepts."""
    parts = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    return f"postgresql+psycopg://{parts.pop('user')}@/{parts.pop('dbname')}?{urlencode(parts)}"


def administrator(conninfo: str) -> str:
    """Return the connection string of a role that may create databases: the embedded server's role may not."""
    return conninfo if os.environ.get("TEST_DATABASE_URL") else make_conninfo(conninfo, user="postgres")


def migrate(conninfo: str, role: str = "todo_app", *, partitioned: bool = PARTITIONED) -> None:
    """Prepare an empty database as a start does. If TEST_PARTITIONED is set, share its tables out over partitions."""
    apply_migrations(conninfo)
    if partitioned:
        partition(conninfo)
    ensure_role(conninfo, role, pooler=False, owner=conninfo)


def partition(conninfo: str) -> None:
    """Replace the tables, which must be empty, by tables with the same columns, keys and policies, but partitioned."""
    with psycopg.connect(conninfo) as owner:
        owner.execute("CREATE SCHEMA whole")
        for name in TABLES:
            table = sql.Identifier(name)
            owner.execute(sql.SQL("ALTER TABLE {} SET SCHEMA whole").format(table))
            owner.execute(
                sql.SQL("CREATE TABLE {0} (LIKE whole.{0} INCLUDING ALL) PARTITION BY HASH (user_id)").format(table)
            )
            for number in range(PARTITIONS):
                owner.execute(
                    sql.SQL("CREATE TABLE {} PARTITION OF {} FOR VALUES WITH (MODULUS {}, REMAINDER {})").format(
                        sql.Identifier(f"{name}_{number}"), table, PARTITIONS, number
                    )
                )
            owner.execute(sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(table))
        policies = owner.execute("SELECT policyname, tablename, qual FROM pg_policies WHERE schemaname = 'whole'")
        for policy, name, condition in policies.fetchall():
            owner.execute(
                sql.SQL("CREATE POLICY {} ON {} USING ({})").format(
                    sql.Identifier(policy), sql.Identifier(name), sql.SQL(condition)
                )
            )
        owner.execute("DROP SCHEMA whole CASCADE")


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
