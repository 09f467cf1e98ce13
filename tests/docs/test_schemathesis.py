"""schemathesis sends valid and invalid requests, generated from the OpenAPI document, to a running service."""

import subprocess
import sys
from pathlib import Path

import psycopg
from psycopg.rows import TupleRow

from tests.support.service import Service

CONFIG = str(Path(__file__).with_name("schemathesis.toml"))


def test_schemathesis_finds_no_failure(service: Service, db: psycopg.Connection[TupleRow], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIG, "run", "--checks", "all"]
    done = subprocess.run(
        [*command, f"{service.url}/openapi.json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: 6" in done.stdout
    assert "Traceback" not in service.log()
    assert db.execute("SELECT count(*) > 0 FROM tasks").fetchone() == (True,)
