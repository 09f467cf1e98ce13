"""Asks the server what ``flask check`` tells about it."""

from dataclasses import dataclass

import psycopg

from todo_api.config import StartError
from todo_api.database import statements
from todo_api.database.connection import PoolerConnection
from todo_api.database.errors import first_line, unreachable

_CONNECT_TIMEOUT = 3  # seconds, also for a URL that allows more: nobody waits for flask check


@dataclass(frozen=True)
class Server:
    """A server, and a database on it."""

    version: str
    encoding: str
    accepts_writes: bool
    size: str  # of the database, with its unit
    free_connections: int  # for the role of the connection string
    service_connections: int  # of running services with this role


def server_of(conninfo: str) -> Server:
    """Return what the server of a connection string is like. The connection string may lead to a pooler.

    Raises:
        StartError: the server does not tell it.
        UnavailableError: the database cannot be reached.

    """
    try:
        with PoolerConnection.connect(
            conninfo, connect_timeout=_CONNECT_TIMEOUT, **PoolerConnection.arguments
        ) as connection:
            row = connection.fetch(statements.load()["database/server"].query())
    except psycopg.OperationalError as error:
        raise unreachable(error) from error
    except psycopg.Error as error:
        raise StartError(first_line(error)) from error
    version, encoding, accepts_writes, size, free, used = (value.decode() for value in row or ())
    return Server(version, encoding, accepts_writes == "t", size, int(free), int(used))
