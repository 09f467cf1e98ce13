"""Makes sessions suit a database with Citus, an extension that shares tables out over several servers.

sql/citus/distribute.sql shares the tables out. The service has nothing else to do with it.
"""

import psycopg

from todo_api.config import StartError
from todo_api.database import statements, url
from todo_api.database.connection import Connection, PoolerConnection, UnpreparedConnection
from todo_api.database.errors import first_line, unreachable

# Citus finds the server of a user's rows in the values of the parameters, which a generic plan lacks. Each statement
# would fail.
_OPTIONS = "-c plan_cache_mode=auto"


def suited(conninfo: str, *, pooler: bool, role: str) -> str:
    """Return the connection string for sessions in which statements work, whether the database has Citus or not.

    A pooler gets no options, and needs none: no statement is prepared there.

    Raises:
        StartError: the tables are shared out, and ``role`` is not ''.
        UnavailableError: the database cannot be reached.

    """
    connection_class = PoolerConnection if pooler else UnpreparedConnection
    loaded = statements.load()
    try:
        with connection_class.connect(conninfo, **Connection.arguments) as connection:
            if connection.fetch(loaded["database/citus"].query()) != (b"t",):
                return conninfo
            is_shared_out = connection.fetch(loaded["database/shared_out"].query()) == (b"t",)
    except psycopg.OperationalError as error:
        raise unreachable(error) from error
    except psycopg.Error as error:
        raise StartError(f"the database cannot be used with Citus: {first_line(error)}") from error
    if role and is_shared_out:
        raise StartError(
            f"the tables are shared out with Citus, where row-level security hides every row from the role {role}: set "
            "DATABASE_ROLE to nothing, and the statements alone keep users apart"
        )
    return conninfo if pooler else url.with_defaults(conninfo, _OPTIONS)
