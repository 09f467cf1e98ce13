"""The settings, read from the environment (and .env) and checked once; nothing else reads the environment."""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

from dotenv import load_dotenv
from environs import Env, ValidationError, validate
from environs.exceptions import EnvError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting, with its default; .env.example says what each is for."""

    database_url: str = ""
    database_pooler: bool = False
    migration_database_url: str = ""
    data_dir: Path = ROOT / ".data"
    host: str = "127.0.0.1"
    port: int = 8000
    web_concurrency: int = 1
    web_threads: int = 4
    user_id: str = "local"
    max_body_bytes: int = 64 * 1024
    cors_origins: tuple[str, ...] = ()


class StartError(Exception):
    """Why the service can't start, in one line for the person who starts it."""


def fail(reason: object) -> NoReturn:
    """End the start with one line on standard error."""
    sys.stderr.write(f"todo_api: {' '.join(str(reason).split())}\n")
    # gunicorn's own status for a worker that can't boot: its master then ends too, and does not try for ever.
    raise SystemExit(3)


def load() -> Settings:
    """Read the settings, or end the process with one line that names the wrong one."""
    try:
        return _read()
    except EnvError as error:
        fail(error)
    except (OSError, ValueError) as error:
        fail(f"{ROOT / '.env'} can't be read: {error}")


def _read() -> Settings:
    # Into the environment, which Env.read_env would leave alone: empty values there mean the default just as well.
    load_dotenv(ROOT / ".env")
    env = Env()
    for name in map(str.upper, Settings.__dataclass_fields__):
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]  # "PORT=" in .env means the default, as if the line were not there
    # A session's time zone reaches the JSON that PostgreSQL writes, and SPEC says UTC. libpq sends PGTZ along when it
    # connects: that costs no statement, and poolers in transaction mode let it pass.
    os.environ["PGTZ"] = "UTC"
    return Settings(
        database_url=env.str("DATABASE_URL", Settings.database_url, validate=_is_database_url),
        database_pooler=env.bool("DATABASE_POOLER", Settings.database_pooler),
        migration_database_url=env.str("MIGRATION_DATABASE_URL", "", validate=_is_database_url),
        # Relative to the project, not to the folder that the command happens to be typed in.
        data_dir=ROOT / env.path("DATA_DIR", Settings.data_dir, validate=_has_home).expanduser(),
        host=env.str("HOST", Settings.host, validate=_is_address),
        port=env.int("PORT", Settings.port, validate=validate.Range(1, 65_535)),
        web_concurrency=env.int("WEB_CONCURRENCY", _default_concurrency(), validate=validate.Range(1, 256)),
        web_threads=env.int("WEB_THREADS", Settings.web_threads, validate=validate.Range(1, 256)),
        user_id=env.str("USER_ID", Settings.user_id, validate=[validate.Length(1, 255), _is_text]),
        max_body_bytes=env.int("MAX_BODY_BYTES", Settings.max_body_bytes, validate=validate.Range(1024, 2**30)),
        cors_origins=_origins(env.str("CORS_ORIGINS", "", validate=_are_origins)),
    )


# What libpq takes, without that for which its own message would show the password: a stray @, / or % in it, or brackets
# that hold no IPv6 address.
_CHARACTER = r"(?:[^][@/?%\s\ud800-\udfff]|%(?!00)[0-9A-Fa-f]{2})"
_DATABASE_URL = re.compile(
    rf"postgres(ql)?://(({_CHARACTER}|[][?])*@)?(\[[0-9A-Fa-f:.]+\](?=[:,/?]|$)|{_CHARACTER})*([/?]({_CHARACTER}|[][/?])*)?"
)


def _is_database_url(url: str) -> None:
    if not _DATABASE_URL.fullmatch(url):
        # It is not shown, since it may hold a password.
        raise ValidationError("It must be like postgresql://user:password@host/name, with %40 for @ in a password.")


def _is_address(host: str) -> None:
    try:
        ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ValidationError("It must be an IP address, such as 127.0.0.1, 0.0.0.0 or ::.") from error


def _has_home(path: Path) -> None:
    try:
        path.expanduser()
    except RuntimeError as error:  # ~ of nobody known
        raise ValidationError(f"{error}") from error


_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|\*")  # no brackets: Flask-CORS takes them for a pattern


def _origins(listed: str) -> tuple[str, ...]:
    return tuple(origin.strip(" ") for origin in listed.split(",")) if listed else ()


def _are_origins(listed: str) -> None:
    for origin in _origins(listed):
        if not _ORIGIN.fullmatch(origin):
            raise ValidationError("Each must be an origin such as https://app.example.com, in small letters, or *.")


def _is_text(text: str) -> None:
    if not text.isprintable():
        raise ValidationError("It must be printable text, in UTF-8.")


def _default_concurrency() -> int:
    # One worker a core, since threads share one interpreter lock; few enough for the connections of a small database.
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def drop_libpq_variables() -> None:
    """Forget PGHOST, PGPORT, PGOPTIONS and their like: they are meant for another server than the embedded one."""
    for name in [name for name in os.environ if name.startswith("PG") and name != "PGTZ"]:
        del os.environ[name]


def set_libpq_variables(variables: Mapping[str, str]) -> None:
    """Tell libpq, and the psql that is started next, where to connect to."""
    os.environ.update(variables)
