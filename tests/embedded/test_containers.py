"""Services that cannot see each other's processes, and root without the capability to see those of other users."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.containers import FEW_CAPABILITIES, container, stop
from tests.support.embedded import (
    assert_failed_with_one_line,
    copy,
    create_task,
    has_task,
    launch_by_hand,
    socket_folder,
)
from tests.support.fixtures import Start
from tests.support.processes import children, postmaster_in, send, servers_in, wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has these capabilities")


@pytest.fixture
def data_dir(open_folder: Path, stopped_data_dir: Path) -> Path:
    """Return a DATA_DIR that was in use before, in a folder that all users can enter."""
    return copy(stopped_data_dir, open_folder / "data")


@pytest.fixture
def long_data_dir(open_folder: Path, stopped_data_dir: Path) -> Path:
    """Return a DATA_DIR whose path is too long for a socket, so that the socket is in a temporary folder."""
    return copy(stopped_data_dir, open_folder / ("x" * 60) / ("y" * 60) / "data")


def log_of_server(data_dir: Path) -> str:
    """Return what the server of a DATA_DIR has logged."""
    return (data_dir / "postgres.log").read_text()


def test_no_second_server_is_started_if_the_first_cannot_be_reached(
    open_folder: Path, long_data_dir: Path, start: Start
) -> None:
    first = start(DATA_DIR=long_data_dir, prefix=container(open_folder / "tmp")).wait()
    task_id = create_task(first)
    postmaster = postmaster_in(open_folder)
    second = start(DATA_DIR=long_data_dir, prefix=container(open_folder / "tmp"))
    assert second.process.wait(timeout=120) == 3
    assert_failed_with_one_line(second, f"runs in {long_data_dir}/postgres", "cannot be reached from here", "DATA_DIR")

    assert postmaster_in(open_folder) == postmaster
    assert has_task(first, create_task(first))
    assert stop(first) == 0
    assert "database system is shut down" in log_of_server(long_data_dir)
    third = start(DATA_DIR=long_data_dir, prefix=container(open_folder / "tmp")).wait()
    assert has_task(third, task_id)
    assert stop(third) == 0


def test_a_start_waits_for_a_suspended_server_in_another_container(
    open_folder: Path, data_dir: Path, start: Start
) -> None:
    first = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp")).wait()
    tasks = [create_task(first)]
    postmaster = postmaster_in(open_folder)
    with suspended(data_dir):
        second = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp"))
        time.sleep(5)  # one attempt to connect takes 2 s
        assert second.process.poll() is None
    tasks.append(create_task(second.wait()))
    assert postmaster_in(open_folder) == postmaster
    wait_until(first.answers)
    assert [has_task(first, task) and has_task(second, task) for task in tasks] == [True, True]

    assert stop(second) == 0
    assert has_task(first.wait(), tasks[0])
    assert stop(first) == 0
    assert "database system is shut down" in log_of_server(data_dir)


@pytest.mark.long
def test_a_start_does_not_wait_forever_for_a_shutdown_in_another_container(
    open_folder: Path, data_dir: Path, start: Start
) -> None:
    first = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp")).wait()
    task_id = create_task(first)
    postmaster = postmaster_in(open_folder)
    send(signal.SIGTERM, postmaster)  # PostgreSQL's smart shutdown waits for the connections of the service
    second = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp"))
    assert second.process.wait(timeout=180) == 3
    assert_failed_with_one_line(second, f"runs in {data_dir}/postgres but shuts down and waits for its clients")
    assert postmaster_in(open_folder) == postmaster
    assert has_task(first, task_id)
    assert stop(first) == 0


def suspended(data_dir: Path) -> "Suspended":
    """Suspend the processes of the server during a block, as "docker pause" does."""
    return Suspended(data_dir)


class Suspended:
    """The processes of a server, which are suspended during a block."""

    def __init__(self, data_dir: Path) -> None:
        """Find the processes."""
        self.processes = [postmaster_in(data_dir), *servers_in(data_dir)]

    def __enter__(self) -> None:
        """Suspend them, the postmaster first, so that it starts no others."""
        send(signal.SIGSTOP, *self.processes)

    def __exit__(self, *_: object) -> None:
        """Resume them."""
        send(signal.SIGCONT, *self.processes)


@as_root
def test_root_without_capabilities_uses_a_manually_started_server(
    open_folder: Path, data_dir: Path, open_programs: Path, start: Start
) -> None:
    (sockets := open_folder / "sockets").mkdir()
    sockets.chmod(0o777)
    manual_server = launch_by_hand(data_dir / "postgres", sockets, open_programs)
    service = start(DATA_DIR=data_dir, POSTGRES_BIN=open_programs, prefix=FEW_CAPABILITIES).wait()
    assert socket_folder(service) == sockets
    assert service.stop() == 0
    assert manual_server.wait(timeout=120) == 0
    assert servers_in(open_folder) == []


@as_root
def test_root_without_capabilities_stops_the_server(
    open_folder: Path, data_dir: Path, open_programs: Path, start: Start
) -> None:
    service = start(DATA_DIR=data_dir, POSTGRES_BIN=open_programs, prefix=FEW_CAPABILITIES).wait()
    assert servers_in(open_folder)
    assert service.stop() == 0
    assert servers_in(open_folder) == []
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


@as_root
def test_root_without_capabilities_stops_the_server_of_a_deleted_folder(
    open_folder: Path, data_dir: Path, open_programs: Path, start: Start
) -> None:
    service = start(DATA_DIR=data_dir, POSTGRES_BIN=open_programs, prefix=FEW_CAPABILITIES).wait()
    data_dir.rename(open_folder / "moved")
    assert service.stop() == 0
    assert servers_in(open_folder) == []


@as_root
def test_process_1_of_a_container_stops_the_server_before_it_ends(
    open_folder: Path, data_dir: Path, open_programs: Path, start: Start
) -> None:
    for _ in range(2):
        prefix = [*container(open_folder / "tmp"), *FEW_CAPABILITIES]
        service = start(DATA_DIR=data_dir, POSTGRES_BIN=open_programs, prefix=prefix).wait()
        assert stop(service) == 0
        assert "database system is shut down" in log_of_server(data_dir)
        assert not (data_dir / "postgres" / "postmaster.pid").exists()


def test_process_1_of_a_container_can_be_stopped_during_its_imports(
    open_folder: Path, data_dir: Path, start: Start
) -> None:
    slow = open_folder / "slow"  # a library on a slow disk
    slow.mkdir()
    (slow / "click.py").write_text(f"import time\nopen({str(slow / 'begun')!r}, 'x').close()\ntime.sleep(600)\n")
    service = start(DATA_DIR=data_dir, PYTHONPATH=slow, prefix=container(open_folder / "tmp"))
    wait_until((slow / "begun").exists)
    assert stop(service) == 0
    assert service.log() == ""


@as_root
def test_root_without_capabilities_waits_for_a_server_that_is_suspended_for_seconds(
    open_folder: Path, data_dir: Path, open_programs: Path, start: Start
) -> None:
    service = start(DATA_DIR=data_dir, POSTGRES_BIN=open_programs, prefix=FEW_CAPABILITIES).wait()
    task_id = create_task(service)
    postmaster = postmaster_in(open_folder)
    service.kill()
    with suspended(data_dir):
        service = start(DATA_DIR=data_dir, POSTGRES_BIN=open_programs, prefix=FEW_CAPABILITIES)
        time.sleep(5)
        assert (data_dir / "postgres" / "postmaster.pid").exists()
    assert has_task(service.wait(), task_id)
    assert postmaster_in(open_folder) == postmaster
    assert service.stop() == 0
    assert servers_in(open_folder) == []


def test_a_server_that_cannot_be_stopped_from_another_container_is_logged(
    open_folder: Path, data_dir: Path, start: Start
) -> None:
    # The first container's process 1 outlives its service.
    first = start(
        DATA_DIR=data_dir, prefix=[*container(open_folder / "tmp"), "sh", "-c", '"$@"; sleep 600', "sh"]
    ).wait()
    inside = children(first.process.pid, recursive=True)
    send(signal.SIGKILL, *(process for process, name in inside.items() if name.startswith("python")))
    second = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp")).wait()
    assert stop(second) == 0
    assert second.log().count("cannot be stopped from here") == 1
    assert servers_in(open_folder)


@as_root
def test_a_stop_that_may_not_signal_the_server_says_so(
    open_folder: Path, data_dir: Path, open_programs: Path, start: Start
) -> None:
    without_kill = ["setpriv", "--bounding-set=-kill"]
    service = start(DATA_DIR=data_dir, POSTGRES_BIN=open_programs, prefix=without_kill).wait()
    task_id = create_task(service)
    postmaster = postmaster_in(open_folder)
    assert service.stop() == 0
    line = f"the PostgreSQL in {data_dir}/postgres may not be stopped by this user (process {postmaster.pid}) and keeps"
    assert service.log().count(line) == 1
    assert "Traceback" not in service.log()

    # The next service uses that server, and stops it.
    service = start(DATA_DIR=data_dir, POSTGRES_BIN=open_programs).wait()
    assert has_task(service, task_id)
    assert postmaster_in(open_folder) == postmaster
    assert service.stop() == 0
    assert servers_in(open_folder) == []


NO_ROOT = {
    "no capabilities": (["setpriv", "--bounding-set=-all"], "add CHOWN, DAC_OVERRIDE, SETGID, SETUID, KILL"),
    "no DAC_OVERRIDE": (["setpriv", "--bounding-set=-all,+chown,+setuid,+setgid,+kill"], "add DAC_OVERRIDE"),
    "no SETUID": (["setpriv", "--bounding-set=-setuid"], "add SETUID"),
    "no other user": (["unshare", "--user", "--map-root-user"], "there is no user"),
}


@as_root
@pytest.mark.parametrize("name", NO_ROOT)
@pytest.mark.parametrize("is_new", [True, False])
def test_root_that_cannot_run_a_process_as_another_user_is_told_what_to_do(
    name: str, *, is_new: bool, open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    prefix, part = NO_ROOT[name]
    data_dir = open_folder / "data"
    if not is_new:
        copy(stopped_data_dir, data_dir)
    before = {path: path.lstat().st_ctime_ns for path in open_folder.rglob("*")}
    service = start(DATA_DIR=data_dir, prefix=prefix)
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, "PostgreSQL does not run as root", part, "--user", "DATABASE_URL")
    assert {path: path.lstat().st_ctime_ns for path in open_folder.rglob("*")} == before


@as_root
def test_root_with_only_the_capabilities_that_the_message_names_serves_and_stops(
    open_folder: Path, open_programs: Path, start: Start
) -> None:
    prefix = ["setpriv", "--bounding-set=-all,+chown,+dac_override,+setgid,+setuid,+kill"]
    for _ in range(2):
        service = start(DATA_DIR=open_folder / "data", POSTGRES_BIN=open_programs, prefix=prefix).wait()
        assert has_task(service, create_task(service))
        assert service.stop() == 0
        assert servers_in(open_folder) == []


@as_root
@pytest.mark.parametrize("closed", ["the folder", "the programs"])
def test_a_folder_that_the_server_cannot_enter_is_named(
    closed: str, open_folder: Path, start: Start, open_programs: Path
) -> None:
    folder = open_folder / "closed"
    folder.mkdir(mode=0o700)
    settings = {"DATA_DIR": folder / "data", "POSTGRES_BIN": open_programs}
    if closed == "the programs":
        packages = open_programs.parents[2]
        subprocess.run(["cp", "-a", packages, folder], check=True)
        bin_folder = folder / packages.name / open_programs.relative_to(packages)
        settings = {"DATA_DIR": open_folder / "data", "POSTGRES_BIN": bin_folder}
    service = start(prefix=FEW_CAPABILITIES, **settings)
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, f"cannot enter {folder}", "DAC_READ_SEARCH", f"chmod o+x {folder}")
    assert not settings["DATA_DIR"].exists()
