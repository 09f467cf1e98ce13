"""Makes the role that statements run as, and checks that row-level security holds for it.

The tables' owner sees every row. So the service logs in as any role, and works as another one, which owns nothing.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from todo_api.config import StartError
from todo_api.database import statements
from todo_api.database.connection import PAUSES, Connection, NetworkConnection, PoolerConnection, UnpreparedConnection
from todo_api.database.errors import first_line, unreachable

log = logging.getLogger(__name__)

# A role belongs to a whole server. A service with another database on it may make the same one at the same time.
_RACES = (
    psycopg.errors.DuplicateObject,
    psycopg.errors.UniqueViolation,
    psycopg.errors.InternalError_,  # "tuple concurrently updated"
    psycopg.errors.DeadlockDetected,
)


def make(conninfo: str, role: str, *, pooler: bool, owner: str) -> None:
    """Make the role if it is missing, and let the login role work as it.

    This precedes the migrations. If it fails, the database is as it was, and the previous version can still use it.
    ``owner`` is the connection string of the role that applies the migrations. If ``role`` is '', nothing is done.

    Raises:
        StartError: an administrator has to run what the message says.
        UnavailableError: the database cannot be reached.

    """
    if role:
        _grant(conninfo, role, pooler=pooler, owner=owner, only_role=True)


def ensure(conninfo: str, role: str, *, pooler: bool, owner: str) -> None:
    """Check that row-level security holds for the role, after granting its rights if necessary.

    ``owner`` is the connection string of the role that applies the migrations. If ``role`` is '', row-level security
    must not hold: without an identity it hides every row.

    Raises:
        StartError: row-level security does not hold, and an administrator has to run what the message says.
        UnavailableError: the database cannot be reached.

    """
    _grant(conninfo, role, pooler=pooler, owner=owner, only_role=False)


def check(conninfo: str, role: str, *, pooler: bool) -> None:
    """Check what ``ensure`` ensures, without changing anything.

    Raises:
        StartError: a right is missing, or row-level security does not hold.
        UnavailableError: the database cannot be reached.

    """
    connection_class = PoolerConnection if pooler else UnpreparedConnection
    with _explained(role), connection_class.connect(conninfo, **Connection.arguments) as connection:
        if commands := _missing_grants(connection, role, only_role=False):
            raise StartError(f"the role {role} lacks rights; a start runs this, or an administrator must: {commands}")
        _check(connection, role)


def _grant(conninfo: str, role: str, *, pooler: bool, owner: str, only_role: bool) -> None:
    connection_class = PoolerConnection if pooler else UnpreparedConnection
    with _explained(role):
        for pause in PAUSES:
            with connection_class.connect(conninfo, **Connection.arguments) as connection:
                if not (commands := _missing_grants(connection, role, only_role=only_role)):
                    if not only_role:
                        _check(connection, role)
                    return
            try:
                _run(owner, commands)
                log.info("row-level security: %s", commands)
            except _RACES:
                time.sleep(pause)
            except psycopg.errors.InsufficientPrivilege as error:
                raise StartError(
                    f"row-level security needs the role {role}, and this start may not make it ({first_line(error)}): "
                    f"let an administrator run in this database: {commands}; or set DATABASE_ROLE to nothing, and the "
                    "statements alone keep users apart"
                ) from error
        raise StartError(f"row-level security: other processes change the role {role} all the time: {commands}")


@contextmanager
def _explained(role: str) -> Iterator[None]:
    """Turn psycopg's errors into those for other packages."""
    try:
        yield
    except psycopg.OperationalError as error:
        raise unreachable(error) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise StartError(
            f"the login role may not work as the role {role} of DATABASE_ROLE, for which row-level security may not "
            "hold: set DATABASE_ROLE to a role that may be created"
        ) from error
    except psycopg.errors.UndefinedTable as error:
        raise StartError(
            f"the role {role} of DATABASE_ROLE does not find the tables ({first_line(error)}), perhaps because the "
            "search_path of the login role has its own schema: put the schema's name there, or set DATABASE_ROLE to "
            "nothing"
        ) from error
    except psycopg.Error as error:
        raise StartError(f"the role {role} of DATABASE_ROLE cannot be used: {first_line(error)}") from error


def _missing_grants(connection: Connection, role: str, *, only_role: bool) -> str:
    query = statements.load()["database/missing_grants"].query(role=role, only_role=only_role)
    row = role and connection.fetch(query)
    return row[0].decode() if row else ""


def _check(connection: Connection, role: str) -> None:
    loaded = statements.load()
    identity = [loaded["database/identify"].query(role=role, user_id="")] if role else []
    holds = connection.fetch(*identity, loaded["database/isolation"].query()) == (b"t",)
    if role and not holds:
        raise StartError(
            f"row-level security does not hold for the role {role}, because it owns the tables, is a superuser or has "
            "BYPASSRLS: set DATABASE_ROLE to a role that may be created"
        )
    if holds and not role:
        raise StartError(
            "row-level security hides every row from the role of DATABASE_URL, because it does not own the tables: set "
            "DATABASE_ROLE, for example to that role"
        )


def _run(conninfo: str, commands: str) -> None:
    """Run commands in one transaction, while no other process migrates this database."""
    with (
        NetworkConnection.connect(conninfo, autocommit=True, client_encoding="UTF8", prepare_threshold=None) as owner,
        owner.transaction(),
    ):
        owner.execute(statements.load()["database/migration_lock"].rows)
        owner.execute(commands.encode())
