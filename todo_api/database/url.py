"""Checks and changes connection strings, in every form that libpq accepts."""

import re
from functools import cache

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo, PGconn

from todo_api.config import StartError

_NOWHERE = "/nowhere"  # a socket folder in which no server listens
_SECRETS = {"sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
_NAMES = {option.keyword.decode() for option in Conninfo.get_defaults()}  # of libpq's parameters


@cache
def check_url(setting: str, url: str) -> None:
    """Check that libpq accepts the URL of a setting, without connecting to its server.

    Raises:
        StartError: the URL is invalid; the message has the name of the setting and the reason, but no part of the URL.
            In a mistyped URL, any part may be the password.

    """
    try:
        # libpq checks some values only when it connects.
        given = conninfo_to_dict(url)
        hosts = str(given.get("host", "")).split(",")
        for host in hosts if "hostaddr" not in given else []:
            if not host.startswith("/"):
                host.encode("idna")  # Python encodes a name in this way before it resolves it
        psycopg.connect(make_conninfo(url, host=",".join([_NOWHERE] * len(hosts)), hostaddr=""))
    except UnicodeError as error:
        raise StartError(f"{setting}: a host name is invalid") from error
    except psycopg.Error as error:
        if _NOWHERE not in str(error):
            raise StartError(f"{setting}: {_without_values(str(error))}") from error


def _without_values(message: str) -> str:
    return re.sub(r'"([^"]*)"', lambda quoted: quoted[0] if quoted[1] in _NAMES else '"…"', message)


def with_defaults(conninfo: str, options: str = "", **defaults: str | int) -> str:
    """Return a connection string with default values for parameters, and with command-line options for the server.

    A parameter that the string, a service file or libpq's environment variables set keeps its value. Options that they
    set follow ours, because the server uses the last value of a setting.
    """
    given = _resolved(conninfo)
    settings: dict[str, str | int] = {name: given.get(name, default) for name, default in defaults.items()}
    if options:
        settings["options"] = f"{options} {given.get('options', '')}".strip()
    return make_conninfo(conninfo, **settings)


def without_secrets(conninfo: str) -> str:
    """Return a connection string or URL as a connection string in which the secrets are hidden."""
    try:
        parts = conninfo_to_dict(conninfo)
    except psycopg.Error:
        return "invalid"  # any part of it may be the password
    hidden = dict.fromkeys(parts.keys() & {"password", *_SECRETS}, "***")
    return make_conninfo("", **(parts | hidden))


def asks_for_tls(conninfo: str) -> bool:
    """Return whether a connection string, a service file or libpq's environment variables require TLS."""
    # With sslrootcert=system, libpq sets sslmode=verify-full.
    return _resolved(conninfo)["sslmode"] in {"require", "verify-ca", "verify-full"}


def _resolved(conninfo: str) -> dict[str, str]:
    """Return the parameters that libpq would connect with. It combines their sources when it begins to connect."""
    pgconn = PGconn.connect_start(make_conninfo(conninfo, host=_NOWHERE, hostaddr="").encode())
    try:
        return {option.keyword.decode(): option.val.decode() for option in pgconn.info if option.val}
    finally:
        pgconn.finish()


def libpq_variables(conninfo: str) -> tuple[dict[str, str], str]:
    """Return libpq's environment variables for a connection string, and a connection string of all other parameters.

    Other users of the machine can read a command's arguments, but not its environment.

    Raises:
        StartError: a secret has no environment variable.

    """
    names = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults() if option.envvar}
    parts = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    if shown := sorted(_SECRETS & parts.keys() - names.keys()):
        raise StartError(
            f"{shown[0]} of the database's URL cannot be passed to PostgreSQL's programs without showing it to other "
            "users of the machine: set it in a service file (PGSERVICEFILE)"
        )
    variables = {names[name].decode(): value for name, value in parts.items() if name in names}
    return variables, make_conninfo("", **{name: value for name, value in parts.items() if name not in names})
