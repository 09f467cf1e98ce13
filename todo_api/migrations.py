"""Brings the database to the state that sql/migrations describes, with yoyo, safely from many processes at once.

yoyo's own lock is a row, which a killed process leaves behind, and it applies a migration and marks it applied in two
transactions, so that a process killed in between leaves a database that no later start can migrate. Here everything,
the marks too, is one transaction that begins with taking an advisory lock: either all of it is there, or nothing, and
the lock ends when the work does. It takes one connection, which a pooler in transaction mode may hand out.
"""

import glob
import hashlib
import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from socket import gethostname
from typing import Any

import psycopg
from psycopg.rows import TupleRow
from yoyo import internalmigrations, read_migrations
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI
from yoyo.exceptions import BadMigration, MigrationConflict
from yoyo.migrations import Migration, MigrationList, default_migration_table, topological_sort

from todo_api import statements
from todo_api.config import StartError
from todo_api.connection import NETWORK

log = logging.getLogger(__name__)


class _Backend(PostgresqlPsycopgBackend):
    """yoyo's backend, with psycopg's own connection strings and with marks that can't be torn from their migrations."""

    connection: psycopg.Connection[TupleRow]

    def __init__(self, conninfo: str) -> None:
        # yoyo's URL parser refuses what libpq takes, such as several hosts, so the whole string goes as an argument.
        uri = DatabaseURI("postgresql+psycopg", None, None, None, None, None, {"conninfo": conninfo})
        super().__init__(uri, default_migration_table)

    def connect(self, dburi: DatabaseURI) -> psycopg.Connection[TupleRow]:
        """Connect as the pool does."""
        # Never prepared: a pooler in transaction mode may not have it.
        return psycopg.connect(dburi.args["conninfo"], autocommit=True, prepare_threshold=None, **NETWORK)

    def apply_one(self, migration: Migration, *_args: Any, **_kwargs: Any) -> None:
        """Apply a migration, mark it and log it, in the transaction that there is."""
        log.info("applying migration %s", migration.id)
        try:
            # yoyo prints the rows of a SELECT, but standard output is not ours: a command may be writing to it.
            with redirect_stdout(io.StringIO()):
                migration.process_steps(self, "apply")
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            raise StartError(f"migration {migration.id} failed: {str(error).partition(chr(10))[0]}") from error
        self.mark_one(migration, log=False)
        # Not with yoyo's log_migration: it needs a passwd entry and a name server.
        _run(self, "log_migration", migration_id=migration.id, checksum=_checksum(migration), hostname=gethostname())


def apply(conninfo: str, folder: Path = statements.MIGRATIONS) -> list[str]:
    """Apply the migrations that are not applied yet, and name them.

    Raises:
        StartError: there are none in the folder, one can't be read or fails, or the database does not come from these.
        psycopg.OperationalError: the database can't be reached.

    """
    migrations = _read(folder)
    try:
        with _Backend(conninfo) as backend, backend.transaction():
            _check_encoding(backend.connection)
            _run(backend, "migration_isolation")
            _run(backend, "migration_lock")
            internalmigrations.upgrade(backend)
            _check_origin(dict(_run(backend, "applied_migrations").fetchall()), migrations)
            missing = backend.to_apply(migrations)
            for migration in missing:
                backend.apply_one(migration)
            return [migration.id for migration in missing]
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        raise StartError(f"the migrations can't be applied: {str(error).partition(chr(10))[0]}") from error


def _check_encoding(connection: psycopg.Connection[TupleRow]) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StartError(f"the database's encoding is {encoding}; to hold any text it must be UTF8")


def _read(folder: Path) -> MigrationList:
    try:
        migrations = read_migrations(glob.escape(str(folder)))
        for migration in migrations:
            migration.load()
        migrations = migrations.replace(topological_sort(migrations))
    except (OSError, LookupError, ValueError, BadMigration, MigrationConflict) as error:
        raise StartError(f"the migrations in {folder} can't be read: {error}") from error
    if not migrations:
        raise StartError(f"there are no migrations in {folder}")
    for migration in migrations:
        if not migration.use_transactions:
            raise StartError(f"migration {migration.id} is not transactional: a killed start would leave half of it")
    return migrations


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


def _run(backend: _Backend, name: str, **parameters: str) -> psycopg.Cursor[TupleRow]:
    return backend.connection.execute(statements.load()[f"database/{name}"].rows, parameters)
