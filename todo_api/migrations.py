"""Brings the database to the state that sql/migrations describes, with yoyo, safely from many processes at once.

yoyo's own lock is a row, which a killed process leaves behind, and it applies a migration and marks it applied in two
transactions, so that a process killed in between leaves a database that no later start can migrate. Here an advisory
lock, which ends with its transaction, takes the place of the row, and the mark is part of the migration's transaction.
"""

import glob
import hashlib
import logging
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import TupleRow
from yoyo import read_migrations
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI
from yoyo.migrations import Migration, MigrationList, default_migration_table

from todo_api import statements
from todo_api.config import StartError

log = logging.getLogger(__name__)


class _Backend(PostgresqlPsycopgBackend):  # type: ignore[misc]
    """yoyo's backend, with psycopg's own connection strings and with marks that can't be torn from their migrations."""

    connection: psycopg.Connection[TupleRow]

    def __init__(self, conninfo: str) -> None:
        # yoyo's URL parser refuses what libpq takes, such as several hosts, so the whole string goes as an argument.
        uri = DatabaseURI("postgresql+psycopg", None, None, None, None, None, {"conninfo": conninfo})
        super().__init__(uri, default_migration_table)

    def connect(self, dburi: DatabaseURI) -> psycopg.Connection[TupleRow]:
        """Connect as the pool does."""
        return _connect(dburi.args["conninfo"], autocommit=True)

    def lock(self, *_args: Any, **_kwargs: Any) -> nullcontext[None]:
        """Do without the row: ``apply`` holds an advisory lock."""
        return nullcontext()

    def apply_one(self, migration: Migration, *_args: Any, **_kwargs: Any) -> None:
        """Apply a migration, mark it and log it in one transaction."""
        with self.transaction():
            migration.process_steps(self, "apply")
            self.mark_one(migration, log=False)
            # Not with yoyo's log_migration: it needs a passwd entry and a name server.
            self.connection.execute(
                _statement("log_migration"),
                {"migration_id": migration.id, "checksum": _checksum(migration), "hostname": socket.gethostname()},
            )


def apply(conninfo: str, folder: Path = statements.MIGRATIONS) -> list[str]:
    """Apply the migrations that are not applied yet, and name them.

    Raises:
        StartError: there are none in the folder, one fails, or the database does not come from these.
        psycopg.OperationalError: the database can't be reached.

    """
    migrations = read_migrations(glob.escape(str(folder)))
    if not migrations:
        raise StartError(f"there are no migrations in {folder}")
    try:
        with _connect(conninfo) as waiting, _Backend(conninfo) as backend:
            waiting.execute(_statement("migration_lock"))  # held until this connection's transaction ends
            return _apply(backend, migrations)
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        raise StartError(f"a migration failed: {str(error).partition(chr(10))[0]}") from error


def _apply(backend: _Backend, migrations: MigrationList) -> list[str]:
    backend.ensure_internal_schema_updated()
    _check_origin(dict(backend.connection.execute(_statement("applied_migrations")).fetchall()), migrations)
    missing = backend.to_apply(migrations)
    for migration in missing:
        backend.apply_one(migration)
        log.info("applied migration %s", migration.id)
    return [migration.id for migration in missing]


def _check_origin(applied: dict[str, str | None], migrations: MigrationList) -> None:
    known = {migration.id: _checksum(migration) for migration in migrations}
    for name, checksum in applied.items():
        if name not in known:
            raise StartError(f"the database is ahead of this code: it has migration {name}, which sql/migrations lacks")
        if checksum not in {None, known[name]}:
            raise StartError(
                f"sql/migrations/{name}.sql was edited after it was applied; "
                "restore it, and make the change in a new file"
            )


def _checksum(migration: Migration) -> str:
    return hashlib.sha256(Path(migration.path).read_text(encoding="utf-8").encode()).hexdigest()


def _statement(name: str) -> bytes:
    return statements.load()[f"database/{name}"].rows


def _connect(conninfo: str, *, autocommit: bool = False) -> psycopg.Connection[TupleRow]:
    # Never prepared: a pooler in transaction mode may not have it.
    return psycopg.connect(conninfo, autocommit=autocommit, connect_timeout=5, prepare_threshold=None)
