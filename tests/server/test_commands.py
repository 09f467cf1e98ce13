"""``flask migrate``, ``flask psql`` and ``flask openapi``, run as on a command line."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg
import pytest

from tests.support.commands import FLASK, flask
from tests.support.environment import ROOT, environment
from tests.support.processes import children, postmaster_in, servers_in, wait_until
from tests.support.service import Service

PLAIN = ["-X", "-A", "-t"]
LIST = ["--set=user_id=local", "-f", "sql/tasks/list.sql"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service on a DATA_DIR that ``flask migrate`` has created."""
    data_dir = tmp_path_factory.mktemp("commands") / "data"
    done = flask("migrate", DATA_DIR=data_dir)
    assert (done.returncode, done.stdout) == (0, "The database is up to date.\n"), done.stderr
    assert servers_in(data_dir) == []
    running = Service(data_dir.with_name("log"), DATA_DIR=data_dir, WEB_CONCURRENCY=1).wait()
    yield running
    assert running.stop() == 0
    assert servers_in(data_dir) == []


@pytest.fixture
def data_dir(service: Service) -> Path:
    """Return the DATA_DIR of the running service."""
    return service.log_file.with_name("data")


def test_migrate_can_be_repeated_while_the_service_runs(service: Service, data_dir: Path) -> None:
    done = flask("migrate", DATA_DIR=data_dir)
    assert (done.returncode, done.stdout) == (0, "The database is up to date.\n"), done.stderr
    assert service.answers()


def test_migrate_reports_an_unreachable_database_in_one_line() -> None:
    done = flask("migrate", DATABASE_URL="postgresql://user:h-u-s-h@127.0.0.1:1/name")
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "h-u-s-h" not in done.stderr


def test_psql_passes_its_arguments_on_and_does_not_affect_a_running_server(service: Service, data_dir: Path) -> None:
    server = postmaster_in(data_dir)
    done = flask("psql", *PLAIN, "-v", "x=it's $HOME", "-c", "select 1", "-f", "-", DATA_DIR=data_dir)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert flask("psql", "--help", DATA_DIR=data_dir).stdout.startswith("psql is the PostgreSQL")
    assert postmaster_in(data_dir) == server
    assert service.answers()


def test_psql_runs_the_sql_files(service: Service, data_dir: Path) -> None:
    task = service.client.post("/api/tasks", json={"title": "Show me in psql"}).json()
    done = flask("psql", "-X", "-v", "ON_ERROR_STOP=1", "--csv", *LIST, DATA_DIR=data_dir)
    assert done.returncode == 0, done.stderr
    assert f"{task['id']},Show me in psql," in done.stdout


@pytest.mark.parametrize(("arguments", "status"), [(["-c", "broken"], 1), (["--no-such-option"], 1)])
def test_the_exit_status_is_that_of_psql(arguments: list[str], status: int, data_dir: Path) -> None:
    assert flask("psql", *PLAIN, *arguments, DATA_DIR=data_dir).returncode == status


def test_the_exit_status_of_a_failed_script_is_that_of_psql(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "script.sql").write_text("broken;")
    stop = ["-v", "ON_ERROR_STOP=1"]
    assert flask("psql", *PLAIN, *stop, "-f", str(tmp_path / "script.sql"), DATA_DIR=data_dir).returncode == 3


def test_psql_starts_the_server_if_it_does_not_run_and_then_stops_it(tmp_path: Path) -> None:
    done = flask("psql", *PLAIN, "-c", "select current_user", DATA_DIR=tmp_path / "data")
    assert (done.returncode, done.stdout) == (0, "todo\n"), done.stderr
    assert servers_in(tmp_path) == []


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGQUIT], [signal.SIGTERM, signal.SIGHUP]], ids=str
)
def test_a_server_that_psql_started_stops_when_the_terminal_is_closed(
    numbers: list[signal.Signals], tmp_path: Path
) -> None:
    command = [*FLASK, "psql", *PLAIN, "-c", "select pg_sleep(600)"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(DATA_DIR=tmp_path / "data"), stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: "psql" in children(process.pid).values())
    for _ in range(2):  # as terminals and shells do
        for number in numbers:
            process.send_signal(number)
        time.sleep(0.03)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode - 128 in numbers
    assert "Traceback" not in errors
    assert servers_in(tmp_path) == []


def test_ctrl_c_cancels_the_statement_in_psql(data_dir: Path) -> None:
    command = [*FLASK, "psql", *PLAIN, "-c", "select pg_sleep(600)"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(DATA_DIR=data_dir), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with psycopg.connect(f"host={data_dir / 'postgres'} port=5432 user=todo dbname=todo", autocommit=True) as db:
        wait_until(lambda: db.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'").rowcount > 0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "canceling statement due to user request" in errors
    assert "Traceback" not in errors


def test_psql_uses_database_url_and_has_no_password_in_its_arguments(tmp_path: Path, data_dir: Path) -> None:
    host = quote(str(data_dir / "postgres"), safe="")
    url = f"postgresql://todo:h-u-s-h@{host}/todo"
    command = [*FLASK, "psql", *PLAIN, "-c", "select pg_sleep(600)"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(DATABASE_URL=url, DATA_DIR=tmp_path / "data"))

    def running() -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):  # the check that this psql runs, which ends soon
            found = [child for child, name in children(process.pid).items() if name == "psql"]
            return [child for child in found if "--version" not in child.cmdline()]
        return []

    wait_until(lambda: bool(running()))
    [child] = running()
    arguments, variables = child.cmdline(), child.environ()
    process.terminate()
    process.wait(timeout=120)
    assert "h-u-s-h" not in " ".join(arguments)
    assert (variables["PGHOST"], variables["PGPASSWORD"]) == (str(data_dir / "postgres"), "h-u-s-h")
    assert not (tmp_path / "data").exists()


def test_psql_gets_the_password_of_database_url(data_dir: Path, tmp_path: Path) -> None:
    # The embedded server does not ask for a password, so the test reads the environment of psql.
    host = quote(str(data_dir / "postgres"), safe="")
    done = flask(
        "psql",
        *PLAIN,
        "-c",
        r"\! printenv PGPASSWORD",
        DATABASE_URL=f"postgresql://todo:h%40sh@{host}/todo",
        DATA_DIR=tmp_path / "data",
    )
    assert (done.returncode, done.stdout) == (0, "h@sh\n"), done.stderr


def test_openapi_needs_no_database_and_creates_no_folder(tmp_path: Path) -> None:
    for settings in ({"DATA_DIR": tmp_path / "data"}, {"DATABASE_URL": "postgresql://127.0.0.1:1/name"}):
        done = flask("openapi", "print", **settings)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["openapi"].startswith("3.")
    assert not (tmp_path / "data").exists()


def test_options_of_psql_choose_another_database_of_the_same_server(data_dir: Path) -> None:
    done = flask("psql", *PLAIN, "-d", "postgres", "-c", "select current_database()", DATA_DIR=data_dir)
    assert done.stdout == "postgres\n"
