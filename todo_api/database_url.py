"""Connection strings, in the forms that libpq takes: read, checked and completed."""

from functools import cache

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

from todo_api.config import StartError

_NOWHERE = "/nowhere"


@cache
def check(setting: str, url: str) -> None:
    """Refuse a URL that libpq does not understand.

    Raises:
        StartError: libpq's reason.

    """
    try:
        # libpq looks at some values only when it connects: so it is asked to, where nobody listens.
        given = conninfo_to_dict(url)
        hosts = str(given.get("host", "")).split(",")
        for host in hosts if "hostaddr" not in given else []:
            if not host.startswith("/"):
                host.encode("idna")  # as Python does before it looks the name up
        psycopg.connect(make_conninfo(url, host=",".join([_NOWHERE] * len(hosts)), hostaddr=""))
    except UnicodeError as error:
        raise StartError(f"{setting}: {host!r} is no name that a host can have") from error
    except psycopg.Error as error:
        if _NOWHERE not in str(error):
            raise StartError(f"{setting}: {error}") from error


def with_options(conninfo: str, options: str) -> str:
    """Add command-line options of the server's to those that a connection string has, if any."""
    given = str(conninfo_to_dict(conninfo).get("options", ""))
    return make_conninfo(conninfo, options=f"{given} {options}".strip())


def as_variables(conninfo: str) -> tuple[dict[str, str], str]:
    """Spread a connection string over libpq's environment variables; what none takes is left over as a string.

    Other users of the machine can read a command's arguments, but not its environment.
    """
    names = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults() if option.envvar}
    parts = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    variables = {names[name].decode(): value for name, value in parts.items() if name in names}
    return variables, make_conninfo("", **{name: value for name, value in parts.items() if name not in names})
