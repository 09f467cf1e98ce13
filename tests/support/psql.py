"""The files of sql/, run with psql."""

import csv
import io
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tests.support.environment import ROOT, environment
from todo_api.embedded import programs

PSQLS = sorted({str(programs.find(None).folder / "psql"), *filter(None, [shutil.which("psql")])})
NULL = "(null)"


def run_psql(
    conninfo: str, file: str, variables: Mapping[str, object], *, psql: str = PSQLS[0], arguments: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a .sql file as the README describes it."""
    assigned = [f"--set={name}={value}" for name, value in variables.items()]
    return subprocess.run(
        [psql, "-X", "-v", "ON_ERROR_STOP=1", *assigned, *arguments, "-f", file, conninfo],
        cwd=ROOT,
        env=environment(PGTZ="UTC"),
        capture_output=True,
        text=True,
        check=False,
    )


def rows_of(conninfo: str, name: str, psql: str = PSQLS[0], **variables: object) -> list[dict[str, Any]]:
    """Run a file of sql/tasks and return its rows as tasks of the API."""
    done = run_psql(
        conninfo, f"sql/tasks/{name}.sql", variables, psql=psql, arguments=("-q", "--csv", "-P", f"null={NULL}")
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [as_task(row) for row in csv.DictReader(io.StringIO(done.stdout, newline=""))]


def as_task(row: dict[str, str]) -> dict[str, Any]:
    """Return psql's texts as the values that the API returns, except for the times: see ``comparable``."""
    return {
        **row,
        "id": int(row["id"]),
        "description": None if row["description"] == NULL else row["description"],
        "completed": {"t": True, "f": False}[row["completed"]],
        "version": int(row["version"]),
        "created_at": datetime.fromisoformat(row["created_at"]),
        "updated_at": datetime.fromisoformat(row["updated_at"]),
    }


def comparable(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task of the API with the times that ``as_task`` returns, in the same order of members."""
    return {name: datetime.fromisoformat(value) if name.endswith("_at") else value for name, value in task.items()}
