"""The settings, read from the environment (and .env) and checked once; nothing else reads the environment."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from environs import Env, ValidationError, validate
from environs.exceptions import EnvError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting, with its default; .env.example says what each is for."""

    database_url: str = ""
    data_dir: Path = ROOT / ".data"
    host: str = "127.0.0.1"
    port: int = 8000
    web_concurrency: int = 1
    web_threads: int = 4
    user_id: str = "local"
    max_body_bytes: int = 64 * 1024


class StartError(Exception):
    """Why the service can't start, in one line for the person who starts it."""


def fail(reason: object) -> NoReturn:
    """End the start with one line on standard error."""
    sys.stderr.write(f"todo_api: {reason}\n")
    # gunicorn's own status for a worker that can't boot: its master then ends too, and does not try for ever.
    raise SystemExit(3)


def load() -> Settings:
    """Read the settings, or end the process with one line that names the wrong one."""
    try:
        return _read()
    except EnvError as error:
        fail(error)


def _read() -> Settings:
    env = Env()
    env.read_env(str(ROOT / ".env"), recurse=False)
    for name in map(str.upper, Settings.__dataclass_fields__):
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]  # "PORT=" in .env means the default, as if the line were not there
    # A session's time zone reaches the JSON that PostgreSQL writes, and SPEC says UTC. libpq sends PGTZ along when it
    # connects: that costs no statement, and poolers in transaction mode let it pass.
    os.environ["PGTZ"] = "UTC"
    return Settings(
        database_url=env.str("DATABASE_URL", Settings.database_url, validate=_is_a_database_url),
        # Relative to the project, not to the folder that the command happens to be typed in.
        data_dir=ROOT / env.path("DATA_DIR", Settings.data_dir).expanduser(),
        host=env.str("HOST", Settings.host),
        port=env.int("PORT", Settings.port, validate=validate.Range(1, 65_535)),
        web_concurrency=env.int("WEB_CONCURRENCY", _default_concurrency(), validate=validate.Range(1, 256)),
        web_threads=env.int("WEB_THREADS", Settings.web_threads, validate=validate.Range(1, 256)),
        user_id=env.str("USER_ID", Settings.user_id, validate=validate.Length(1, 255)),
        max_body_bytes=env.int("MAX_BODY_BYTES", Settings.max_body_bytes, validate=validate.Range(1024, 2**30)),
    )


def _is_a_database_url(url: str) -> None:
    if not url.startswith(("postgresql://", "postgres://")):
        raise ValidationError("it must start with postgresql://")  # not shown: it may hold a password


def _default_concurrency() -> int:
    # One worker a core, since threads share one interpreter lock; few enough for the connections of a small database.
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def drop_libpq_variables() -> None:
    """Forget PGHOST, PGPORT, PGOPTIONS and their like: they are meant for another server than the embedded one."""
    for name in [name for name in os.environ if name.startswith("PG") and name != "PGTZ"]:
        del os.environ[name]


def set_libpq_password(password: str) -> None:
    """Give libpq, and the psql that is started next, a password."""
    os.environ["PGPASSWORD"] = password
