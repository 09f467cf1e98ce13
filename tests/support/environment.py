"""Where the project is, and what its commands find in the environment."""

import os
from dataclasses import fields
from pathlib import Path

from todo_api import config

config.drop_libpq_variables()  # the tests' connection strings say everything

ROOT = Path(__file__).resolve().parents[2]
POOLER = {"DATABASE_POOLER": "true"} if os.environ.get("TEST_POOLER") else {}


def environment(**settings: object) -> dict[str, str]:
    """Give the environment for a command: this one without the service's settings and libpq's, then ``settings``."""
    ours = tuple(field.name.upper() for field in fields(config.Settings))
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PG")}
    return kept | POOLER | {name: str(value) for name, value in settings.items()}
