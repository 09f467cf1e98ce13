"""The embedded PostgreSQL: it works in any DATA_DIR, survives kills, and affects no other files and processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.embedded import (
    AS_USER,
    BIN,
    NOBODY,
    as_user,
    assert_failed_with_one_line,
    copy,
    create_task,
    has_task,
    launch_by_hand,
    owner,
    permissions,
    query,
    socket_folder,
    stop_all,
)
from tests.support.environment import ROOT
from tests.support.fixtures import Start
from tests.support.processes import has_ended, postmaster_in, servers_in, wait_until
from tests.support.service import Service
from todo_api.config import StartError
from todo_api.embedded import cluster
from todo_api.embedded.programs import Programs

SPECIAL_NAME = """it's "my" $(touch pwned); `x` é"""


@pytest.fixture(scope="module")
def special_folder_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Start a service for the first time: in a folder with a special name, with libpq variables for another server."""
    folder = tmp_path_factory.mktemp("odd")  # short, because the path of a socket is limited to 103 bytes
    libpq_variables: dict[str, Any] = {
        "PGPORT": 1,
        "PGHOST": "nowhere.invalid",
        "PGHOSTADDR": "192.0.2.1",
        "PGUSER": "root",
        "PGDATABASE": "x",
    }
    libpq_variables |= {
        "PGOPTIONS": "-c no_such_setting=1",
        "PGSERVICE": "nothing",
        "PGSSLMODE": "verify-full",
        "PGDATA": "/x",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        service = Service(folder / "log", DATA_DIR=folder / SPECIAL_NAME, **libpq_variables).wait()
        yield service
        assert service.stop() == 0
    assert servers_in(folder) == []


# ---- the folder and its socket


def test_the_first_start_works_in_a_folder_whose_name_contains_shell_commands(special_folder_service: Service) -> None:
    assert has_task(special_folder_service, create_task(special_folder_service))
    assert (special_folder_service.log_file.parent / SPECIAL_NAME / "postgres" / "PG_VERSION").exists()
    folders = {
        Path.cwd(),
        ROOT,
        special_folder_service.log_file.parent,
        special_folder_service.log_file.parent / SPECIAL_NAME,
        Path.home(),
        Path("/"),
    }
    assert [folder for folder in folders if (folder / "pwned").exists()] == []


def test_the_logged_psql_line_works_in_a_shell(special_folder_service: Service) -> None:
    assert query(special_folder_service, "select 1") == "1"


def test_libpq_variables_for_another_server_are_ignored(special_folder_service: Service) -> None:
    # The fixture sets them. Each one would break the start or lead the service to another server.
    assert query(special_folder_service, "select current_user || current_database()") == "todotodo"
    assert has_task(special_folder_service, create_task(special_folder_service))


def test_the_server_listens_on_no_network_address(special_folder_service: Service) -> None:
    servers = servers_in(special_folder_service.log_file.parent, "net_connections")
    assert servers
    assert [server.info["net_connections"] for server in servers if server.info["net_connections"]] == []
    assert query(special_folder_service, "show listen_addresses") == ""


def test_only_the_servers_user_can_open_its_socket(special_folder_service: Service) -> None:
    folder = special_folder_service.log_file.parent / SPECIAL_NAME / "postgres"
    assert [permissions(folder), permissions(folder / ".s.PGSQL.5432")] == [0o700, 0o700]


def test_the_role_of_the_service_is_not_a_superuser(special_folder_service: Service) -> None:
    role_query = "select rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls from pg_roles"
    assert query(special_folder_service, role_query + " where rolname = current_user") == "f|f|f|f|f"


def test_a_cluster_without_the_role_of_the_statements_gets_it_at_the_next_start(tmp_path: Path, start: Start) -> None:
    first = start(DATA_DIR=tmp_path / "data", DATABASE_ROLE="").wait()  # as an earlier version left it
    task_id = create_task(first)
    assert "todo_app" not in query(first, "select rolname from pg_roles")
    assert first.stop() == 0
    for role in ("todo_app", 'an "odd" \\ role'):
        service = start(DATA_DIR=tmp_path / "data", DATABASE_ROLE=role).wait()
        assert has_task(service, task_id)
        assert role in query(service, "select rolname from pg_roles").splitlines()
        assert service.stop() == 0


def test_a_long_path_gets_a_private_socket_folder_that_is_reused_and_removed(
    tmp_path: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = copy(stopped_data_dir, tmp_path / "long" / ("x" * 60) / ("y" * 60) / "data")
    service = start(DATA_DIR=data_dir).wait()
    folder = socket_folder(service)
    assert not folder.is_relative_to(data_dir)
    assert (permissions(folder), owner(folder)) == (0o700, owner(data_dir / "postgres"))
    task_id = create_task(service)

    service.kill()
    service = start(DATA_DIR=data_dir).wait()
    assert (socket_folder(service), has_task(service, task_id)) == (folder, True)

    service.kill()
    postmaster_in(tmp_path).kill()
    wait_until(lambda: not servers_in(tmp_path))
    service = start(DATA_DIR=data_dir).wait()
    assert (socket_folder(service), has_task(service, task_id)) == (folder, True)

    assert service.stop() == 0
    assert not folder.exists()


def test_a_path_with_a_comma_gets_a_private_socket_folder(tmp_path: Path, stopped_data_dir: Path, start: Start) -> None:
    data_dir = copy(stopped_data_dir, tmp_path / "one,two")  # for libpq, a comma separates two hosts
    first, second = start(DATA_DIR=data_dir), start(DATA_DIR=data_dir)
    assert has_task(second.wait(), create_task(first.wait()))
    folder = socket_folder(first)
    assert stop_all([first, second]) == [0, 0]
    assert not folder.exists()


def test_a_folder_that_is_not_writable_fails_with_one_line(tmp_path: Path, start: Start) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)  # the user of the service cannot write here
    service = start(DATA_DIR=closed / "data", prefix=AS_USER)
    assert service.process.wait(timeout=120) != 0
    assert_failed_with_one_line(service, "DATA_DIR", "Permission denied")


def test_a_file_instead_of_the_folder_fails_with_one_line(tmp_path: Path, start: Start) -> None:
    (tmp_path / "data").touch()
    service = start(DATA_DIR=tmp_path / "data")
    assert service.process.wait(timeout=120) != 0
    assert_failed_with_one_line(service, "DATA_DIR", "File exists")


def test_a_folder_with_a_line_break_fails_with_one_line(tmp_path: Path, start: Start) -> None:
    service = start(DATA_DIR=tmp_path / "two\nlines")
    assert service.process.wait(timeout=120) != 0
    assert_failed_with_one_line(service, "DATA_DIR", "line break")
    assert list(tmp_path.glob("two*")) == []


def test_data_dir_is_not_created_if_database_url_is_set(tmp_path: Path, start: Start, database_url: str) -> None:
    service = start(DATABASE_URL=database_url, DATA_DIR=tmp_path / "data").wait()
    assert service.stop() == 0
    assert not (tmp_path / "data").exists()


# ---- killed, stopped and damaged


def test_tasks_survive_a_sigkill_of_any_process(tmp_path: Path, stopped_data_dir: Path, start: Start) -> None:
    victims = ["the process group", "the master", "the postmaster and the process group"]
    services = {victim: start(DATA_DIR=copy(stopped_data_dir, tmp_path / victim)) for victim in victims}
    tasks = {victim: create_task(service.wait()) for victim, service in services.items()}
    for victim, service in services.items():
        if "postmaster" in victim:
            postmaster_in(tmp_path / victim).kill()
        if "group" in victim:
            service.kill()
        service.stop(signal.SIGKILL)

    restarted = {victim: start(DATA_DIR=tmp_path / victim) for victim in victims}
    for victim, service in restarted.items():
        assert has_task(service.wait(), tasks[victim]), victim
    assert stop_all(restarted.values()) == [0, 0, 0]
    assert servers_in(tmp_path) == []


def test_a_start_killed_during_initdb_is_repaired_by_the_next_start(tmp_path: Path, start: Start) -> None:
    victims = ["the process group", "the master"]
    for victim in victims:
        service = start(DATA_DIR=tmp_path / victim)
        wait_until(partial(has_begun, tmp_path / victim))
        if "group" in victim:
            service.kill()
        service.stop(signal.SIGKILL)  # if only the master is killed, initdb runs on for a while
    for service in [start(DATA_DIR=tmp_path / victim) for victim in victims]:
        assert has_task(service, create_task(service.wait()))
    assert [victim for victim in victims if (tmp_path / victim / "postgres.new").exists()] == []


def has_begun(data_dir: Path) -> bool:
    """Return whether initdb has begun to create a cluster. On a busy machine it may already have finished."""
    return any(data_dir.glob("postgres*/PG_VERSION"))


def test_an_incomplete_cluster_is_created_again(tmp_path: Path, start: Start) -> None:
    incomplete = tmp_path / "data" / "postgres.new"
    (incomplete / "base").mkdir(parents=True)
    (incomplete / "PG_VERSION").write_text("18\n")
    service = start(DATA_DIR=tmp_path / "data").wait()
    assert has_task(service, create_task(service))
    assert not incomplete.exists()


def test_sigterm_and_sigint_leave_no_process(tmp_path: Path, stopped_data_dir: Path, start: Start) -> None:
    signals = [signal.SIGTERM, signal.SIGINT]
    services = [
        start(DATA_DIR=copy(stopped_data_dir, tmp_path / signal_number.name)).wait() for signal_number in signals
    ]
    assert servers_in(tmp_path)
    assert [service.stop(signal_number) for service, signal_number in zip(services, signals, strict=True)] == [0, 0]
    assert servers_in(tmp_path) == []
    assert [service.log() for service in services if "Traceback" in service.log()] == []


WSGI = [sys.executable, "wsgi.py"]
GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "python:todo_api.server.gunicorn_conf", "wsgi:app"]


@pytest.mark.parametrize(
    ("command", "signal_number"),
    [
        *((WSGI, number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)),
        ([*WSGI, "--preload"], signal.SIGTERM),
        ([*WSGI, "--preload"], signal.SIGINT),
        (GUNICORN, signal.SIGTERM),
        *(([*GUNICORN, "--preload"], number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else value.name,
)
def test_a_stop_during_the_start_leaves_no_process(
    command: list[str], signal_number: signal.Signals, tmp_path: Path, data_dir: Path, start: Start
) -> None:
    (data_dir / "postgres.log").unlink()
    service = start(DATA_DIR=data_dir, command=command)
    wait_until((data_dir / "postgres.log").exists)  # created just before the server's process
    assert service.stop(signal_number) == 0
    assert servers_in(tmp_path) == []
    assert "Traceback" not in service.log()


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]], ids=str)
def test_repeated_signals_during_the_start_leave_no_process(
    numbers: list[signal.Signals], tmp_path: Path, data_dir: Path, start: Start
) -> None:
    (data_dir / "postgres.log").unlink()
    service = start(DATA_DIR=data_dir)
    wait_until((data_dir / "postgres.log").exists)
    assert service.stop_repeatedly(*numbers) == 0
    assert servers_in(tmp_path) == []
    assert "Traceback" not in service.log()


def test_a_start_under_nohup_survives_sighup(data_dir: Path, start: Start) -> None:
    (data_dir / "postgres.log").unlink()
    service = start(DATA_DIR=data_dir, prefix=["nohup"])
    wait_until((data_dir / "postgres.log").exists)
    service.process.send_signal(signal.SIGHUP)
    service.wait()


# Starts the server of a folder, and sends itself a signal to stop when a function comes to its nth line.
SIGNALLED = """
import os, signal, sys
from pathlib import Path
from todo_api import embedded

data_dir, programs, function, lines = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def trace(frame, event, _):
    global lines
    if event == "line" and frame.f_code.co_name == function:
        lines -= 1
        if not lines:
            os.kill(os.getpid(), signal.SIGTERM)
    return trace

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
sys.settrace(trace)
embedded.start(data_dir, programs)
if function not in {"ignore", "_leave"}:
    sys.exit("the signal is lost")
"""


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("record", 1),  # the server has been started, and its process id is not recorded yet
        *(("_leave", line) for line in range(1, 4)),  # at the exit
        *(("ignore", line) for line in range(1, 7)),  # which begins to ignore the signals
        *(("_internal_poll", line) for line in range(1, 6)),  # in the standard library: __del__ calls it; it has a lock
    ],
)
def test_a_stop_at_an_unsafe_line_of_the_start_leaves_no_process(
    function: str, line: int, tmp_path: Path, data_dir: Path
) -> None:
    (programs := tmp_path / "programs").mkdir()
    for program in BIN.iterdir():
        (programs / program.name).symlink_to(program)
    (programs / "postgres").unlink()
    # While it sleeps, nothing but the record in server.lock shows that this is the server.
    (programs / "postgres").write_text(f"#!/bin/sh\n[ $1 = -D ] && sleep 0.3\nexec '{BIN / 'postgres'}' \"$@\"\n")
    (programs / "postgres").chmod(0o755)
    command = [sys.executable, "-c", SIGNALLED, str(data_dir), str(programs), function, str(line)]
    done = subprocess.run(command, cwd=ROOT, timeout=120, check=False)
    assert (done.returncode, servers_in(tmp_path)) == (0, [])


def test_a_damaged_postmaster_pid_is_repaired(tmp_path: Path, stopped_data_dir: Path, start: Start) -> None:
    services = []
    for index, content in enumerate(["", "4711", "4711\n/nowhere\n1\n5432\n\n", "\n" * 6]):
        data_dir = copy(stopped_data_dir, tmp_path / str(index))
        (data_dir / "postgres" / "postmaster.pid").write_text(content)
        services.append(start(DATA_DIR=data_dir))
    for service in services:
        assert has_task(service, create_task(service.wait()))


def test_a_process_that_reuses_a_stale_process_id_is_not_killed(data_dir: Path, start: Start) -> None:
    # Process ids are reused. In a container, the same few ids come back after each crash.
    owner_prefix = as_user(owner(data_dir / "postgres"))
    unrelated_process = subprocess.Popen([*owner_prefix, "sleep", "600"])
    try:
        lines = f"{unrelated_process.pid}\n{data_dir}/postgres\n1700000000\n5432\n{data_dir}/postgres\n"
        (data_dir / "postgres" / "postmaster.pid").write_text(lines)
        (data_dir / "postgres" / ".s.PGSQL.5432.lock").write_text(lines)
        service = start(DATA_DIR=data_dir).wait()
        assert has_task(service, create_task(service))
        assert unrelated_process.poll() is None
        assert service.stop() == 0
        assert unrelated_process.poll() is None
    finally:
        unrelated_process.kill()
        unrelated_process.wait()


def test_a_copy_of_a_folder_in_use_gets_its_own_server(
    tmp_path: Path, data_dir: Path, stopped_data_dir: Path, start: Start
) -> None:
    original = start(DATA_DIR=data_dir).wait()
    duplicate = copy(stopped_data_dir, tmp_path / "copy")
    shutil.copy(data_dir / "postgres" / "postmaster.pid", duplicate / "postgres")
    service = start(DATA_DIR=duplicate).wait()
    create_task(service)
    assert original.client.get("/api/tasks").json() == []


def test_a_manually_started_server_is_used_and_its_socket_folder_is_kept(
    tmp_path: Path, data_dir: Path, start: Start
) -> None:
    sockets = Path(tempfile.mkdtemp())
    try:
        (sockets / "precious").touch()
        sockets.chmod(0o777)
        manual_server = launch_by_hand(data_dir / "postgres", sockets)
        service = start(DATA_DIR=data_dir).wait()
        assert socket_folder(service) == sockets
        assert service.stop() == 0
        assert manual_server.wait(timeout=120) == 0
        assert servers_in(tmp_path) == []
        assert [file.name for file in sockets.iterdir()] == ["precious"]
    finally:
        shutil.rmtree(sockets)


def test_a_killed_server_that_its_parent_has_not_reaped_yet_is_replaced(
    tmp_path: Path, data_dir: Path, start: Start
) -> None:
    killed = launch_by_hand(data_dir / "postgres", data_dir / "postgres")
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: has_ended(psutil.Process(killed.pid)) and servers_in(tmp_path) == [])
    create_task(start(DATA_DIR=data_dir).wait())
    killed.wait()


def test_a_stop_after_the_folder_was_deleted_leaves_no_process(tmp_path: Path, data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    assert servers_in(tmp_path)
    shutil.rmtree(data_dir)
    assert service.stop() == 0
    assert servers_in(tmp_path) == []
    assert "Traceback" not in service.log()


# ---- several services, and other users


def test_two_services_share_a_server_that_stops_with_the_last_one(tmp_path: Path, data_dir: Path, start: Start) -> None:
    first, second = start(DATA_DIR=data_dir), start(DATA_DIR=data_dir)
    first.wait()
    second.wait()
    assert has_task(second, create_task(first))
    server = postmaster_in(tmp_path)

    assert first.stop() == 0
    assert has_task(second, create_task(second))
    assert postmaster_in(tmp_path) == server

    assert second.stop() == 0
    assert servers_in(tmp_path) == []


def test_the_server_does_not_run_as_root_and_no_other_folder_changes(tmp_path: Path, start: Start) -> None:
    closed = tmp_path / "closed" / "inner"
    closed.mkdir(parents=True)
    for folder in (closed, closed.parent):
        folder.chmod(0o700)
    other_folders = [closed, *closed.parents, ROOT, BIN, *BIN.parents]
    before = [(path, owner(path), permissions(path)) for path in other_folders]

    service = start(DATA_DIR=closed / "data").wait()
    assert has_task(service, create_task(service))
    server_owner = owner(closed / "data" / "postgres")
    assert server_owner not in {0, NOBODY} if os.geteuid() == 0 else server_owner == os.geteuid()
    servers = servers_in(tmp_path, "uids")
    assert {server.info["uids"].effective for server in servers} == {server_owner}
    assert {server.info["uids"].saved for server in servers} == {server_owner}
    assert service.stop() == 0
    assert [(path, owner(path), permissions(path)) for path in other_folders] == before
    assert [path.name for path in closed.iterdir()] == ["data"]


def test_the_service_works_for_a_user_other_than_root(tmp_path: Path, start: Start) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if os.geteuid() == 0:
        os.chown(home, NOBODY, NOBODY)
    options = {"DATA_DIR": home / "data", "HOME": home, "prefix": AS_USER}
    service = start(**options).wait()
    task_id = create_task(service)
    assert psutil.Process(service.process.pid).uids().effective != 0
    assert {owner(file) for file in home.rglob("*")} == {owner(home)}

    service.kill()
    service = start(**options).wait()
    assert has_task(service, task_id)
    assert service.stop() == 0
    assert servers_in(tmp_path) == []


# ---- messages


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["LOG: starting", "FATAL: first", "FATAL: second", "LOG: shut down"], "FATAL: second"),
        (["FATAL:  a", "x DETAIL:  b", "\tc", "x HINT:  d", "LOG:  e"], "FATAL:  a DETAIL:  b \tc HINT:  d"),
        (["FATAL:  cause", "x FATAL:  the database system is in recovery mode"], "FATAL:  cause"),
        (["LOG: starting", "postgres: unknown option"], "postgres: unknown option"),
        ([], "it left no message"),
    ],
)
def test_the_last_error_is_the_last_fatal_line_with_its_details_or_else_the_last_line(
    lines: list[str], expected: str, tmp_path: Path
) -> None:
    log_file = cluster.log_of(tmp_path / "postgres")
    log_file.write_text("\n".join(lines))
    assert cluster.last_error(tmp_path / "postgres") == f"{expected} ({log_file})"


def test_a_path_of_the_programs_with_special_characters_is_rejected(tmp_path: Path) -> None:
    programs = Programs(Path('/my "$HOME"/bin'), 18)
    with pytest.raises(StartError, match=re.escape(' to a shell, which does not take " $ literally; ')):
        cluster.create(tmp_path / "postgres", programs, lock=-1)
