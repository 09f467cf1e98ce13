"""The service with the embedded PostgreSQL: killed processes and full disks lose no acknowledged task."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median

import httpx
import psutil
import psycopg
import pytest

from tests.support.fixtures import Figure, Start
from tests.support.load import Call, Load, assert_acknowledged_once, assert_unavailable, create
from tests.support.optional_tools import program
from tests.support.postgres import admit_all_roles
from tests.support.problems import assert_quick
from tests.support.processes import free_port, postmaster_in, postmasters_in, send, servers_in, wait_until
from tests.support.service import Service, workers


def conninfo(host: Path) -> str:
    """Return the connection string of the PostgreSQL with its Unix socket in a folder."""
    return f"host={host} port=5432 user=todo dbname=todo"


def has_settled(service: Service) -> bool:
    """Return whether a service responds, or has ended: a kill during its start may have ended it."""
    return service.process.poll() is not None or service.answers()


def kill_master(service: Service, _: Path) -> None:
    """Kill the master; its workers notice it after about a second."""
    service.stop(signal.SIGKILL)


def kill_worker(service: Service, _: Path) -> None:
    """Kill one of the workers."""
    send(signal.SIGKILL, *workers(service)[:1])


def kill_postmaster(_: Service, data_dir: Path) -> None:
    """Kill the postmaster; PostgreSQL's other processes notice it."""
    send(signal.SIGKILL, *postmasters_in(data_dir))  # there is none before it has started


def kill_backend(_: Service, data_dir: Path) -> None:
    """Kill one of PostgreSQL's other processes; the postmaster then restarts all of them."""
    send(signal.SIGKILL, *[server for server in servers_in(data_dir) if server.info["ppid"] != 1][-1:])


def kill_everything(service: Service, data_dir: Path) -> None:
    """Kill all processes of the service and of PostgreSQL."""
    service.kill()
    send(signal.SIGKILL, *servers_in(data_dir))


Kill = Callable[[Service, Path], None]
KILLS: list[Kill] = [kill_master, kill_postmaster, kill_worker, kill_everything, kill_backend]


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.long)])
def test_every_task_survives_a_kill_of_any_process_at_any_moment(
    rounds: int, tmp_path: Path, start: Start, figure: Figure
) -> None:
    seed = random.randrange(2**32)
    figure(f"seed of {rounds} crashes", seed)
    chance = random.Random(seed)
    data_dir, port = tmp_path / "data", free_port()
    calls: list[Call] = []
    kills = (chance.sample(KILLS, 5) * rounds)[:rounds]
    for kill in kills:
        service = start(DATA_DIR=data_dir, PORT=port, WEB_CONCURRENCY=2)
        if chance.random() < 0.7 or not calls:  # otherwise the kill happens during the start
            service.wait()
        with Load(service, 4) as load:
            time.sleep(chance.uniform(0.1, 1.5))
            kill(service, data_dir)
            wait_until(partial(has_settled, service))  # without a restart of the service
            time.sleep(0.3)
        calls += load.calls
        assert set(load.statuses()) <= {0, 201, 503}
        assert "Traceback" not in service.log()
        if service.process.poll() is None:
            service.kill()
        again = start(DATA_DIR=data_dir, PORT=port, WEB_CONCURRENCY=2)
        wait_until(again.serves)
        assert_acknowledged_once(calls, conninfo(data_dir / "postgres"))
        assert again.stop() == 0
        assert servers_in(data_dir) == []


def test_two_services_restart_one_server_and_it_survives_the_service_that_started_it(
    tmp_path: Path, start: Start
) -> None:
    first, second = [start(DATA_DIR=tmp_path / "data", WEB_CONCURRENCY=2) for _ in range(2)]
    with Load(first.wait(), 4) as load, Load(second.wait(), 4) as other_load:
        for _ in range(2):
            (killed := postmaster_in(tmp_path)).kill()
            wait_until(partial(is_gone, killed, tmp_path))
            wait_until(lambda: all(service.answers() for service in (first, second)))
            assert postmaster_in(tmp_path) != killed
        time.sleep(0.5)
        server = postmaster_in(tmp_path)
        starter, survivor, survivors_load = first, second, other_load
        if os.getpgid(server.info["ppid"]) == second.process.pid:
            starter, survivor, survivors_load = second, first, load
        before = len(survivors_load.calls)
        starter.kill()
        time.sleep(1)
        wait_until(lambda: len(survivors_load.calls) > before + 100)
    assert {call.status for call in survivors_load.calls[before:]} == {201}
    assert set(survivors_load.statuses()) <= {201, 503}
    assert_acknowledged_once(load.calls + other_load.calls, conninfo(tmp_path / "data" / "postgres"))
    assert postmaster_in(tmp_path) == server
    assert survivor.stop() == 0
    assert servers_in(tmp_path) == []


def is_gone(server: psutil.Process, folder: Path) -> bool:
    """Return whether a server has ended. It may be a zombie until the service reaps it."""
    return server not in servers_in(folder)


def test_requests_get_quick_503s_while_the_server_is_suspended(tmp_path: Path, start: Start, figure: Figure) -> None:
    service = start(DATA_DIR=tmp_path / "data").wait()
    postmaster_in(tmp_path).suspend()  # first, so that it starts no other processes
    hanging = servers_in(tmp_path)
    send(signal.SIGSTOP, *hanging)
    delays = []
    with Load(service, 4) as load:
        until = time.monotonic() + 5
        while (began := time.monotonic()) < until:
            assert service.answers("/healthz")
            delays.append(time.monotonic() - began)
            time.sleep(0.02)
    send(signal.SIGCONT, *hanging)
    wait_until(service.answers)
    assert set(load.statuses()) == {503}
    assert_quick(service)
    figure("PostgreSQL hangs: slowest /healthz, ms", round(1000 * max(delays)))
    assert median(delays) < 0.5
    assert service.stop() == 0


# ---- a full disk

# A small disk is mounted in a mount namespace, so only the service sees it, and it disappears with the service. Without
# root, the mount needs a user namespace. PostgreSQL does not run as root, so a second one inside restores the user.
AS_CURRENT_USER = (
    [] if os.geteuid() == 0 else ["unshare", "-U", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"]
)


def start_on_disk(start: Start, size: str, data_dir: Path, before: str = "") -> Service:
    """Start a service with its DATA_DIR on a small disk, after the script ``before`` has run on the same disk."""
    data_dir.mkdir()
    namespace = [program("unshare"), "-m"] if os.geteuid() == 0 else [program("unshare"), "-rm"]
    script = f'mount -t tmpfs -o size={size} tmpfs "$0"; {before} exec "$@"'
    prefix = [*namespace, "sh", "-c", script, str(data_dir), *AS_CURRENT_USER]
    return start(prefix=prefix, DATA_DIR=data_dir, WEB_CONCURRENCY=2)


@pytest.mark.parametrize("free_mib", [20, *(pytest.param(free, marks=pytest.mark.long) for free in (1, 40))])
def test_a_disk_too_full_for_a_cluster_is_reported_in_one_line_and_the_next_start_succeeds(
    free_mib: int, tmp_path: Path, start: Start
) -> None:
    fill_disk = f'head -c {200 - free_mib}M /dev/zero > "$0/filler"; "$@"; echo "status $?"; rm "$0/filler";'
    service = start_on_disk(start, "200m", tmp_path / "d", fill_disk)
    assert create(service.wait().client).status == httpx.codes.CREATED
    failed, started = service.log().split("status 3\n")
    # PostgreSQL writes the second text if a part of a block could still be written.
    assert re.search(
        r"todo_api: (initdb|createdb) failed: .*(No space left on device|Check free disk space).*\n$", failed
    )
    assert failed.count("todo_api: ") == 1
    assert "Traceback" not in failed + started
    assert service.stop() == 0


@pytest.mark.parametrize(
    "failure", ["tables cannot grow", pytest.param("the write-ahead log cannot grow", marks=pytest.mark.long)]
)
def test_requests_get_a_503_while_the_disk_is_full(failure: str, tmp_path: Path, start: Start) -> None:
    service = start_on_disk(start, "64m", tmp_path / "d").wait()
    disk = Path(f"/proc/{service.process.pid}/root{tmp_path / 'd'}")
    folder_fd = os.open(disk / "postgres", os.O_PATH)  # a short path to the socket; the limit is 107 bytes
    server = Path(f"/proc/self/fd/{folder_fd}")
    superuser = admit_all_roles(server, postmaster_in(tmp_path / "d"))
    with Load(service, 4) as load:
        time.sleep(0.5)
        fill(disk / "filler")
        wait_until(lambda: has_panicked(superuser, service) if "log" in failure else "DiskFull" in service.log())
        time.sleep(2)
        full = load.calls[-8:]
        (disk / "filler").unlink()
        load.first_success(time.monotonic())
        time.sleep(0.5)
    for call in [call for call in full if call.status != httpx.codes.CREATED]:
        assert_unavailable(call)
    assert set(load.statuses()) == {201, 503}
    assert_quick(service)
    assert "Traceback" not in service.log()
    assert_acknowledged_once(load.calls, conninfo(server))
    os.close(folder_fd)
    assert service.stop() == 0


def fill(file: Path) -> None:
    """Write to a file until the disk is full."""
    with file.open("wb", buffering=0) as output, suppress(OSError):
        while True:
            output.write(b"x" * 4096)


def has_panicked(superuser: str, service: Service) -> bool:
    """Start a new file of the write-ahead log, and return whether PostgreSQL has failed because the disk is full."""
    with suppress(psycopg.OperationalError), psycopg.connect(superuser, autocommit=True) as db:
        db.execute("SELECT pg_logical_emit_message(true, 'test', 'something to log')")
        db.execute("SELECT pg_switch_wal()")
    return "No space left on device" in service.log()
