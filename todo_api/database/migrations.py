"""Applies sql/migrations with yoyo. Many processes can do so at once.

yoyo's own lock is a row, and a killed process leaves that row behind. Besides, yoyo applies a migration in one
transaction and records it in another. A process that is killed in between leaves a database that no later start can
migrate. Here one transaction applies and records all pending migrations. It begins with an advisory lock, which is
released when the transaction ends. One connection is enough, and it may come from a pooler in transaction mode.
"""

import glob
import hashlib
import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
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

from todo_api.config import StartError
from todo_api.database import statements
from todo_api.database.connection import NetworkConnection
from todo_api.database.errors import first_line, unreachable

log = logging.getLogger(__name__)


class _Backend(PostgresqlPsycopgBackend):
    """yoyo's backend, changed to accept any connection string and to use the caller's transaction."""

    connection: psycopg.Connection[TupleRow]

    def __init__(self, conninfo: str) -> None:
        # yoyo's URL parser rejects some connection strings, such as those with several hosts. So it is not used.
        uri = DatabaseURI("postgresql+psycopg", None, None, None, None, None, {"conninfo": conninfo})
        super().__init__(uri, default_migration_table)

    def connect(self, dburi: DatabaseURI) -> psycopg.Connection[TupleRow]:
        """Return a connection with the network settings of the pool's connections."""
        return NetworkConnection.connect(
            dburi.args["conninfo"],
            autocommit=True,
            client_encoding="UTF8",
            prepare_threshold=None,  # a pooler in transaction mode may use another connection for the next statement
        )

    def apply_one(self, migration: Migration, *_args: Any, **_kwargs: Any) -> None:
        """Apply a migration and record it, in the current transaction."""
        log.info("applying migration %s", migration.id)
        try:
            # yoyo prints the rows of a SELECT, but standard output is for the command that runs.
            with redirect_stdout(io.StringIO()):
                migration.process_steps(self, "apply")
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            raise StartError(f"migration {migration.id} failed: {first_line(error)}") from error
        self.mark_one(migration, log=False)
        # yoyo's own log_migration fails for a user without a passwd entry, and may wait for a name server.
        checksum = _checksum(migration)
        run(
            self.connection,
            "database/log_migration",
            migration_id=migration.id,
            checksum=checksum,
            hostname=gethostname(),
        )


def apply(conninfo: str, folder: Path = statements.MIGRATIONS) -> list[str]:
    """Apply the pending migrations and return their names.

    Raises:
        StartError: the folder has no migrations; a migration is invalid, is not transactional, was edited after it was
            applied, or fails; the database has a migration that the folder lacks, or its encoding is not UTF8.
        UnavailableError: the database cannot be reached.

    """
    migrations = read(folder)
    with locked(conninfo) as backend:
        return apply_pending(backend, migrations)


def pending(conninfo: str) -> tuple[int, list[str]]:
    """Return the number of applied migrations and the names of the pending ones, without changing anything.

    Raises:
        StartError: a migration was edited after it was applied, or the database has an unknown one.
        UnavailableError: the database cannot be reached.

    """
    known = read()
    applied: dict[str, str | None] = {}
    try:
        with NetworkConnection.connect(conninfo, autocommit=True, prepare_threshold=None) as connection:
            applied = dict(run(connection, "database/applied_migrations").fetchall())
    except psycopg.OperationalError as error:
        raise unreachable(error) from error
    except psycopg.errors.UndefinedTable:
        pass  # none is applied
    except psycopg.Error as error:
        raise StartError(f"the record of the migrations cannot be read: {first_line(error)}") from error
    check_applied(applied, known)
    return len(applied), [migration.id for migration in known if migration.id not in applied]


@contextmanager
def locked(conninfo: str, failure: str = "the migrations cannot be applied") -> Iterator[_Backend]:
    """Run a block in one transaction, while no other process migrates the database, and yield yoyo's backend for it.

    ``failure`` begins the message if the block fails.

    Raises:
        StartError: the block fails with an error of the database, or the database's encoding is not UTF8.
        UnavailableError: the database cannot be reached.

    """
    try:
        with _Backend(conninfo) as backend, backend.transaction():
            _check_encoding(backend.connection)
            run(backend.connection, "database/migration_isolation")
            run(backend.connection, "database/migration_lock")
            internalmigrations.upgrade(backend)
            yield backend
    except psycopg.OperationalError as error:
        raise unreachable(error) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise StartError(
            f"{failure}: {first_line(error)}: let the role create tables (GRANT CREATE ON "
            "SCHEMA), or set MIGRATION_DATABASE_URL to a URL with a role that may create tables"
        ) from error
    except psycopg.Error as error:
        raise StartError(f"{failure}: {first_line(error)}") from error


def apply_pending(backend: _Backend, migrations: MigrationList) -> list[str]:
    """Apply the migrations that are not applied yet, in the current transaction, and return their names.

    Raises:
        StartError: a migration was edited after it was applied, or fails, or the database has an unknown one.

    """
    check_applied(dict(run(backend.connection, "database/applied_migrations").fetchall()), migrations)
    pending = backend.to_apply(migrations)
    for migration in pending:
        backend.apply_one(migration)
    return [migration.id for migration in pending]


def roll_back(backend: _Backend, migrations: MigrationList, kept: set[str]) -> None:
    """Roll back the applied migrations but those that are kept, the newest first, in the current transaction."""
    for migration in backend.to_rollback(migrations):
        if migration.id not in kept:
            log.info("rolling back migration %s", migration.id)
            with redirect_stdout(io.StringIO()):
                migration.process_steps(backend, "rollback")
            backend.unmark_one(migration, log=False)


def _check_encoding(connection: psycopg.Connection[TupleRow]) -> None:
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StartError(f"the database's encoding is {encoding}; it must be UTF8, so that it can store all text")


def read(folder: Path = statements.MIGRATIONS) -> MigrationList:
    """Return the migrations in a folder, in the order in which they are applied.

    Raises:
        StartError: there are none, or one is invalid or not transactional.

    """
    try:
        migrations = read_migrations(glob.escape(str(folder)))
        for migration in migrations:
            migration.load()
        migrations = migrations.replace(topological_sort(migrations))
    except (OSError, LookupError, ValueError, BadMigration, MigrationConflict) as error:
        raise StartError(f"the migrations in {folder} are invalid: {error}") from error
    if not migrations:
        raise StartError(f"there are no migrations in {folder}")
    for migration in migrations:
        if not migration.use_transactions:
            raise StartError(
                f"migration {migration.id} is not transactional: a start that is killed could apply half of it"
            )
    return migrations


def check_applied(applied: Mapping[str, str | None], migrations: MigrationList) -> None:
    """Check the applied migrations of a database, which have the checksum of their file or None.

    Raises:
        StartError: one of them is unknown, or was edited after it was applied.

    """
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


def run(connection: psycopg.Connection[TupleRow], name: str, /, **parameters: object) -> psycopg.Cursor[TupleRow]:
    """Run a statement of sql/ on a connection of psycopg, and return its cursor."""
    sql, values = statements.load()[name].query(**parameters)
    return psycopg.RawCursor(connection).execute(sql, [value.decode() for value in values])
