"""Who may log in to the embedded PostgreSQL: the service's role, and nobody as the superuser once it is set up."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.containers import FEW_CAPABILITIES
from tests.support.embedded import (
    AS_USER,
    BIN,
    NOBODY,
    UNKNOWN,
    as_user,
    copy,
    create_task,
    has_task,
    owner,
    permissions,
    psql_line,
)
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.postgres import can_log_in
from tests.support.processes import send, servers_in, wait_until
from todo_api.embedded import cluster as clusters
from todo_api.embedded import programs

IDENTITY = "SELECT current_user || ' ' || current_database()"
SURROUNDINGS = {
    "root": (0, []),
    "root without capabilities": (0, FEW_CAPABILITIES),
    "nobody": (NOBODY, AS_USER),
    "a user without a passwd entry": (UNKNOWN, as_user(UNKNOWN)),
}


def as_role(cluster: Path, role: str) -> str:
    """Return a connection string for a role, with the only database that is sure to exist, postgres."""
    return f"host={cluster} port=5432 user={role} dbname=postgres"


def output(command: list[str], **settings: object) -> str:
    """Run a command in the project's folder, and return its output and its errors."""
    done = subprocess.run(command, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def assert_superuser_is_refused(cluster: Path, prefix: list[str]) -> None:
    """Check that a user reaches the server, which refuses the superuser."""
    psql = [*prefix, str(BIN / "psql"), "--command=SELECT 1"]
    assert 'no pg_hba.conf entry for host "[local]", user "postgres"' in output([*psql, as_role(cluster, "postgres")])
    assert "(1 row)" in output([*psql, as_role(cluster, "todo")])


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_each_user_uses_the_database_as_the_service_does_and_never_as_the_superuser(
    name: str, open_folder: Path, open_programs: Path, start: Start
) -> None:
    user, prefix = SURROUNDINGS[name]
    if os.geteuid() == 0:
        os.chown(open_folder, user, user)
    settings = {"DATA_DIR": open_folder / "data", "POSTGRES_BIN": open_programs}
    service = start(prefix=prefix, **settings).wait()
    assert has_task(service, create_task(service))

    cluster = open_folder / "data" / "postgres"
    for other in (prefix, as_user(owner(cluster))):
        assert_superuser_is_refused(cluster, other)
    plain = ["-X", "-A", "-t", "-c", IDENTITY]
    assert output([*prefix, *shlex.split(psql_line(service)), *plain]) == "todo todo\n"
    flask = [*prefix, sys.executable, "-m", "flask", "--app", "wsgi", "psql"]
    assert output([*flask, *plain], **settings).startswith("todo todo\n")
    assert service.stop() == 0
    assert output([*flask, *plain], **settings).startswith("todo todo\n")  # it starts the server again
    assert servers_in(open_folder) == []


# ---- clusters of earlier versions, and starts that were killed


@pytest.fixture
def old_data_dir(tmp_path: Path, stopped_data_dir: Path) -> Path:
    """Return a DATA_DIR as an earlier version left it: with initdb's rules, which let everybody in."""
    data_dir = copy(stopped_data_dir, tmp_path / "data")
    rules = data_dir / "postgres" / "pg_hba.conf"
    rules.with_name("pg_hba.conf.before").replace(rules)
    assert "trust" in rules.read_text()
    return data_dir


@contextmanager
def running_server(data_dir: Path) -> Iterator[None]:
    """Run the server of a DATA_DIR during a block, and at its end kill it, unless a service has stopped it."""
    cluster = data_dir / "postgres"
    server = clusters.launch(cluster, cluster, programs.find(None))
    try:
        wait_until(lambda: can_log_in(as_role(cluster, "postgres")))
        yield
    finally:
        server.kill()
        server.wait()


def assert_set_up(data_dir: Path, start: Start) -> None:
    """Check that a start makes the service work, and refuses the superuser from then on."""
    for _ in range(2):
        service = start(DATA_DIR=data_dir).wait()
        assert has_task(service, create_task(service))
        assert_superuser_is_refused(data_dir / "postgres", [])
        rules = data_dir / "postgres" / "pg_hba.conf"
        assert (owner(rules), permissions(rules)) == (owner(data_dir / "postgres"), 0o600)
        assert service.stop() == 0


def test_a_cluster_of_an_earlier_version_keeps_its_tasks_and_its_rules(old_data_dir: Path, start: Start) -> None:
    rules = old_data_dir / "postgres" / "pg_hba.conf"
    with rules.open("a") as opened:
        opened.write("local all monitoring trust\n")
    text = rules.read_text()
    service = start(DATA_DIR=old_data_dir).wait()
    task_id = create_task(service)
    assert service.stop() == 0
    assert_set_up(old_data_dir, start)
    assert rules.with_name("pg_hba.conf.before").read_text() == text
    assert has_task(start(DATA_DIR=old_data_dir).wait(), task_id)


def test_a_running_server_of_an_earlier_version_refuses_the_superuser_too(old_data_dir: Path, start: Start) -> None:
    with running_server(old_data_dir):
        service = start(DATA_DIR=old_data_dir).wait()
        assert has_task(service, create_task(service))
        assert_superuser_is_refused(old_data_dir / "postgres", [])
        assert service.stop() == 0
    assert_set_up(old_data_dir, start)


def before_the_server_started(rules: Path) -> None:
    """Leave the first rules, half written."""
    rules.with_name("pg_hba.conf.new").write_text("local all")


def between_two_renames(rules: Path) -> None:
    """Leave no rules."""
    rules.unlink()


def before_the_reload(rules: Path) -> None:
    """Leave the last rules, and a server that has not read them yet."""
    rules.write_bytes(rules.with_name("closed").read_bytes())


@pytest.mark.parametrize("leave", [before_the_server_started, between_two_renames, before_the_reload])
def test_the_set_up_of_a_start_that_was_killed_is_completed(
    leave: Callable[[Path], None], old_data_dir: Path, stopped_data_dir: Path, start: Start
) -> None:
    rules = old_data_dir / "postgres" / "pg_hba.conf"
    copy(stopped_data_dir / "postgres" / "pg_hba.conf", rules.with_name("closed"))
    with running_server(old_data_dir):
        leave(rules)
        service = start(DATA_DIR=old_data_dir).wait()
        assert_superuser_is_refused(old_data_dir / "postgres", [])
        assert service.stop() == 0
    leave(rules)
    assert_set_up(old_data_dir, start)


@pytest.mark.parametrize("killed", ["the service", "the service and the server"])
def test_a_start_that_is_killed_while_it_changes_the_rules_is_completed(
    killed: str, old_data_dir: Path, start: Start
) -> None:
    first = start(DATA_DIR=old_data_dir).wait()
    task_id = create_task(first)
    assert first.stop() == 0
    rules = old_data_dir / "postgres" / "pg_hba.conf"
    rules.with_name("pg_hba.conf.before").replace(rules)
    service = start(DATA_DIR=old_data_dir)
    wait_until(lambda: rules.exists() and rules.read_text().startswith("# The service"))
    service.kill()
    if "server" in killed:
        send(signal.SIGKILL, *servers_in(old_data_dir))
        wait_until(lambda: not servers_in(old_data_dir))
    assert_set_up(old_data_dir, start)
    assert has_task(start(DATA_DIR=old_data_dir).wait(), task_id)


def test_a_database_that_was_dropped_is_created_again(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    create_task(service)
    assert service.stop() == 0
    flask = [sys.executable, "-m", "flask", "--app", "wsgi", "psql", "-X", "-d", "postgres"]
    assert output([*flask, "-c", "DROP DATABASE todo"], DATA_DIR=data_dir).startswith("DROP DATABASE\n")
    service = start(DATA_DIR=data_dir).wait()
    assert service.client.get("/api/tasks").json() == []
    assert service.stop() == 0
    assert_set_up(data_dir, start)


@pytest.mark.parametrize("role", ["postgres", "pg_execute_server_program"])
def test_a_powerful_role_is_refused_and_not_granted(role: str, data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, DATABASE_ROLE=role)
    assert service.process.wait(timeout=120) == 3
    assert "set DATABASE_ROLE to the name of a new role" in service.log()
    service = start(DATA_DIR=data_dir).wait()
    try_role = [str(BIN / "psql"), f"--command=SET ROLE {role}", as_role(data_dir / "postgres", "todo")]
    assert "permission denied to set role" in output(try_role)
    assert service.stop() == 0
