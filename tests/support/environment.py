"""The project's folder, and the environment variables of the commands that tests run."""

import os
from dataclasses import fields
from pathlib import Path

from todo_api import config

config.drop_libpq_variables()  # the tests' connection strings are complete

ROOT = Path(__file__).resolve().parents[2]
POOLER = {"DATABASE_POOLER": "true"} if os.environ.get("TEST_POOLER") else {}


def environment(**settings: object) -> dict[str, str]:
    """Return the environment for a command: ``settings``, and variables that neither the service nor libpq reads."""
    ours = tuple(field.name.upper() for field in fields(config.Settings))
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PG")}
    return kept | POOLER | {name: str(value) for name, value in settings.items()}
