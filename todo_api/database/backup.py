"""What a backup has: the rows of the service's tables. The tables themselves come from the migrations.

So a restore runs nothing of the file as SQL. It applies the migrations that the backup had, loads its rows, and applies
the migrations that came later.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow
from yoyo.migrations import MigrationList

from todo_api.config import StartError
from todo_api.database import archive, migrations, url
from todo_api.database.connection import NetworkConnection
from todo_api.database.errors import first_line, unreachable
from todo_api.database.migrations import run

_BOOKKEEPING = "_yoyo_migration"
_ID_OF_MIGRATION = "migration_id"
_FOREIGN = "the file is not a backup of this service: it lacks the record of the migrations, or the ids"
_OWNER = "set MIGRATION_DATABASE_URL to a URL with the role that owns the tables"
# Let a program notice in half a minute that the network drops every packet.
_NETWORK: dict[str, str | int] = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 10,
    "keepalives_interval": 10,
    "keepalives_count": 2,
    "tcp_user_timeout": 30_000,  # milliseconds
}


@dataclass(frozen=True)
class Snapshot:
    """The database at one moment, for other sessions too as long as the block of ``snapshot`` runs."""

    name: str
    conninfo: str  # leads to the server that has the snapshot, even if a name or a list leads to several servers
    tables: list[str]  # their names, quoted as in SQL
    tasks: str  # their number, in words
    major: int  # the version of the server
    is_encrypted: bool  # whether the connection uses TLS


@dataclass(frozen=True)
class Contents:
    """What a script of pg_restore restores."""

    migrations: set[str]
    size: int  # in bytes of the rows


def program_parameters(conninfo: str) -> tuple[dict[str, str], str]:
    """Return libpq's environment variables for pg_dump, and a connection string of all other parameters.

    Raises:
        StartError: a secret has no environment variable.

    """
    return url.libpq_variables(url.with_defaults(conninfo, "", **_NETWORK))


@contextmanager
def snapshot(conninfo: str) -> Iterator[Snapshot]:
    """Hold a snapshot of the service's tables while a block runs.

    Raises:
        StartError: the database has no tables, it is ahead of the code, or its role does not see every row.
        UnavailableError: the database cannot be reached.

    """
    known = migrations.read()
    try:
        connection = NetworkConnection.connect(conninfo, client_encoding="UTF8", prepare_threshold=None)
    except psycopg.OperationalError as error:
        raise unreachable(error) from error
    try:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        found = _snapshot(conninfo, connection, known)
    except psycopg.OperationalError as error:
        raise unreachable(error) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise StartError(f"the role may not read every table ({first_line(error)}): {_OWNER}") from error
    except psycopg.errors.UndefinedTable as error:
        raise StartError(f"the database is not migrated ({first_line(error)}): there is nothing to back up") from error
    except psycopg.Error as error:
        raise StartError(f"the database cannot be backed up: {first_line(error)}") from error
    else:
        yield found
    finally:
        connection.close()


def _snapshot(conninfo: str, connection: NetworkConnection, known: MigrationList) -> Snapshot:
    run(connection, "database/no_timeouts")
    applied = run(connection, "database/applied_migrations").fetchall()
    migrations.check_applied(dict(applied), known)
    return Snapshot(
        name=_value(connection, "database/export_snapshot"),
        conninfo=make_conninfo(
            conninfo, host=connection.info.host, hostaddr=connection.info.hostaddr, port=connection.info.port
        ),
        tables=_visible_tables(connection),
        tasks=_counted(int(_value(connection, "database/task_count")), "task"),
        major=connection.info.server_version // 10_000,
        is_encrypted=connection.pgconn.ssl_in_use,
    )


def _visible_tables(connection: psycopg.Connection[TupleRow]) -> list[str]:
    found = run(connection, "database/backup_tables").fetchall()
    if hidden := [name for name, is_hidden in found if is_hidden]:
        raise StartError(f"row-level security hides rows of {' and '.join(hidden)} from the role: {_OWNER}")
    return [name for name, _ in found]


def _counts(connection: psycopg.Connection[TupleRow]) -> tuple[int, int]:
    [(tasks, keys)] = run(connection, "database/row_counts").fetchall()
    return tasks, keys


def _in_words(tasks: int, keys: int) -> str:
    return f"{_counted(tasks, 'task')} and {_counted(keys, 'idempotency key')}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _value(connection: psycopg.Connection[TupleRow], name: str, **parameters: object) -> str:
    [(value,)] = run(connection, name, **parameters).fetchall()
    return str(value)


def check(script: Iterable[bytes]) -> Contents:
    """Return what the script of a backup restores.

    Raises:
        StartError: it is not that of a backup of this service, or of a newer version of it.

    """
    applied: set[str] = set()
    size = numbers = 0
    for part in archive.parts(script):
        if isinstance(part, int):
            numbers += 1
        elif part.table != _BOOKKEEPING:
            size += sum(map(len, part.lines))
        else:
            applied |= set(_migrations_in(part))
    known = [migration.id for migration in migrations.read()]
    if unknown := sorted(applied - set(known)):
        raise StartError(
            f"the file is of a newer version of the service: it has migration {unknown[0]}, which sql/migrations lacks"
        )
    if not applied or numbers != 1 or applied != set(known[: len(applied)]):
        raise StartError(_FOREIGN)
    return Contents(applied, size)


def _migrations_in(rows: archive.Rows) -> Iterator[str]:
    for line in rows.lines:
        values = line.decode(errors="replace").rstrip("\n").split("\t")
        if len(values) != len(rows.columns) or _ID_OF_MIGRATION not in rows.columns:
            raise StartError(_FOREIGN)
        yield values[rows.columns.index(_ID_OF_MIGRATION)]


def restore(
    conninfo: str, contents: Contents, script: Iterable[bytes], progress: Callable[[int], None] = lambda _: None
) -> str:
    """Restore a backup into a database without tasks, all of it or nothing, and return the number of rows in words.

    ``progress`` is called with the number of bytes that are loaded.

    Raises:
        StartError: the database has tasks, or does not accept the rows.
        UnavailableError: the database cannot be reached.

    """
    known = migrations.read()
    with migrations.locked(conninfo, "the backup cannot be restored") as backend:
        connection = backend.connection
        run(connection, "database/no_timeouts")
        migrations.apply_pending(backend, known)
        _visible_tables(connection)
        run(connection, "database/lock_tables")
        if any(counts := _counts(connection)):
            raise StartError(f"the database already has {_in_words(*counts)}: restore into an empty database")
        migrations.roll_back(backend, known, contents.migrations)
        next_id = _load(connection, script, progress)
        migrations.apply_pending(backend, known)
        counts = _counts(connection)
        run(connection, "database/analyze_tables")
        run(connection, "database/continue_ids", next_id=next_id)  # last, because a rollback does not undo it
    return _in_words(*counts)


def _load(connection: psycopg.Connection[TupleRow], script: Iterable[bytes], progress: Callable[[int], None]) -> int:
    """Load the rows of a script, and return the next id."""
    next_id = loaded = 0
    for part in archive.parts(script):
        if isinstance(part, int):
            next_id = part
        elif part.table != _BOOKKEEPING:
            [(command,)] = run(
                connection, "database/copy_command", name=part.table, columns=json.dumps(part.columns)
            ).fetchall()
            if not command:
                raise StartError(f"the file has a table {part.table} or columns of it that this service does not have")
            with connection.cursor().copy(command.encode()) as copy:
                for line in part.lines:
                    copy.write(line)
                    loaded += len(line)
                    progress(loaded)
    return next_id
