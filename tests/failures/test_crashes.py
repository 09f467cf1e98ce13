"""The service on its own PostgreSQL: whatever is killed, and whatever fills its disk, no acknowledged task is lost."""

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
from tests.support.problems import assert_quick
from tests.support.processes import free_port, postmaster_in, postmasters_in, servers_in, wait_until
from tests.support.service import Service, workers


def conninfo(host: Path, user: str = "todo") -> str:
    """Give the connection string of the PostgreSQL that has its socket in a folder."""
    return f"host={host} port=5432 user={user} dbname=todo"


def has_settled(service: Service) -> bool:
    """Say whether a service answers, or has ended: it may have given up a start in which something was killed."""
    return service.process.poll() is not None or service.answers()


def kill_master(service: Service, _: Path) -> None:
    """SIGKILL the master; its workers notice it within a second or so."""
    service.stop(signal.SIGKILL)


def kill_worker(service: Service, _: Path) -> None:
    """SIGKILL one of the workers."""
    for worker in workers(service)[:1]:
        worker.kill()


def kill_postmaster(_: Service, data_dir: Path) -> None:
    """SIGKILL PostgreSQL's first process; the others notice it."""
    for postmaster in postmasters_in(data_dir):  # none, where it is being started just now
        postmaster.kill()


def kill_backend(_: Service, data_dir: Path) -> None:
    """SIGKILL one of PostgreSQL's other processes; the first one then restarts all of them."""
    for server in [server for server in servers_in(data_dir) if server.info["ppid"] != 1][-1:]:
        with suppress(psutil.NoSuchProcess):
            server.kill()


def kill_everything(service: Service, data_dir: Path) -> None:
    """SIGKILL all processes."""
    service.kill()
    for server in servers_in(data_dir):
        with suppress(psutil.NoSuchProcess):
            server.kill()


Kill = Callable[[Service, Path], None]
KILLS: list[Kill] = [kill_master, kill_postmaster, kill_worker, kill_everything, kill_backend]


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.long)])
def test_whatever_is_killed_at_whatever_moment_the_next_start_has_every_task(
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
        if chance.random() < 0.7 or not calls:  # or in the middle of the start
            service.wait()
        with Load(service, 4) as load:
            time.sleep(chance.uniform(0.1, 1.5))
            kill(service, data_dir)
            wait_until(partial(has_settled, service))  # without another start
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


def test_two_services_agree_on_a_new_server_which_outlives_its_starter(tmp_path: Path, start: Start) -> None:
    first, second = [start(DATA_DIR=tmp_path / "data", WEB_CONCURRENCY=2) for _ in range(2)]
    with Load(first.wait(), 4) as load, Load(second.wait(), 4) as other_load:
        for _ in range(2):
            (killed := postmaster_in(tmp_path)).kill()
            wait_until(partial(is_gone, killed, tmp_path))
            wait_until(lambda: all(service.answers() for service in (first, second)))
            assert postmaster_in(tmp_path) != killed
        time.sleep(0.5)
        server = postmaster_in(tmp_path)
        starter, survivor, going_on = first, second, other_load
        if os.getpgid(server.info["ppid"]) == second.process.pid:
            starter, survivor, going_on = second, first, load
        before = len(going_on.calls)
        starter.kill()
        time.sleep(1)
        wait_until(lambda: len(going_on.calls) > before + 100)
    assert {call.status for call in going_on.calls[before:]} == {201}
    assert set(going_on.statuses()) <= {201, 503}
    assert_acknowledged_once(load.calls + other_load.calls, conninfo(tmp_path / "data" / "postgres"))
    assert postmaster_in(tmp_path) == server
    assert survivor.stop() == 0
    assert servers_in(tmp_path) == []


def is_gone(server: psutil.Process, folder: Path) -> bool:
    """Say whether a server is none any more; as a zombie it stays for the service to look after it."""
    return server not in servers_in(folder)


def test_a_server_that_hangs_holds_up_no_call(tmp_path: Path, start: Start, figure: Figure) -> None:
    service = start(DATA_DIR=tmp_path / "data").wait()
    postmaster_in(tmp_path).suspend()  # first, so that the others are all there are
    hanging = servers_in(tmp_path)
    for process in hanging:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    delays = []
    with Load(service, 4) as load:
        until = time.monotonic() + 5
        while (began := time.monotonic()) < until:
            assert service.answers("/healthz")
            delays.append(time.monotonic() - began)
            time.sleep(0.02)
    for process in hanging:
        with suppress(psutil.NoSuchProcess):
            process.resume()
    wait_until(service.answers)
    assert set(load.statuses()) == {503}
    assert_quick(service)
    figure("PostgreSQL hangs: slowest /healthz, ms", round(1000 * max(delays)))
    assert median(delays) < 0.5
    assert service.stop() == 0


# ---- a full disk

# Mounts a small disk that only the service sees. Where root mounts it, it goes with the last process that sees it. Who
# is not root is root in a user namespace of his own, and himself again, as PostgreSQL insists, in another one inside.
AS_ONESELF = [] if os.geteuid() == 0 else ["unshare", "-U", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"]


def start_on_disk(start: Start, size: str, data_dir: Path, before: str = "") -> Service:
    """Start a service that has its DATA_DIR on a small disk; "before" is a script that runs first, on the same disk."""
    data_dir.mkdir()
    space = [program("unshare"), "-m"] if os.geteuid() == 0 else [program("unshare"), "-rm"]
    script = f'mount -t tmpfs -o size={size} tmpfs "$0"; {before} exec "$@"'
    prefix = [*space, "sh", "-c", script, str(data_dir), *AS_ONESELF]
    return start(prefix=prefix, DATA_DIR=data_dir, WEB_CONCURRENCY=2)


@pytest.mark.parametrize("room", [20, *(pytest.param(room, marks=pytest.mark.long) for room in (1, 40))])
def test_a_disk_too_full_for_a_cluster_is_named_in_one_line_and_with_space_the_next_start_works(
    room: int, tmp_path: Path, start: Start
) -> None:
    ball = f'head -c {200 - room}M /dev/zero > "$0/ball"; "$@"; echo "status $?"; rm "$0/ball";'
    service = start_on_disk(start, "200m", tmp_path / "d", ball)
    assert create(service.wait().client).status == httpx.codes.CREATED
    failed, started = service.log().split("status 3\n")
    assert re.search(r"todo_api: (initdb|createdb) failed: .*No space left on device.*\n$", failed)
    assert failed.count("todo_api: ") == 1
    assert "Traceback" not in failed + started
    assert service.stop() == 0


@pytest.mark.parametrize(
    "harm", ["tables can't grow", pytest.param("the write-ahead log can't", marks=pytest.mark.long)]
)
def test_a_disk_that_runs_full_is_a_clear_503_until_there_is_space_again(
    harm: str, tmp_path: Path, start: Start
) -> None:
    service = start_on_disk(start, "64m", tmp_path / "d").wait()
    disk = Path(f"/proc/{service.process.pid}/root{tmp_path / 'd'}")
    entrance = os.open(disk / "postgres", os.O_PATH)  # a short way to the socket, whose path may have 107 bytes
    server = Path(f"/proc/self/fd/{entrance}")
    with Load(service, 4) as load:
        time.sleep(0.5)
        fill(disk / "ball")
        wait_until(lambda: has_panicked(server, service) if "log" in harm else "DiskFull" in service.log())
        time.sleep(2)
        full = load.calls[-8:]
        (disk / "ball").unlink()
        load.first_success(time.monotonic())
        time.sleep(0.5)
    for call in [call for call in full if call.status != httpx.codes.CREATED]:
        assert_unavailable(call)
    assert set(load.statuses()) == {201, 503}
    assert_quick(service)
    assert "Traceback" not in service.log()
    assert_acknowledged_once(load.calls, conninfo(server))
    os.close(entrance)
    assert service.stop() == 0


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as output, suppress(OSError):
        while True:
            output.write(b"x" * 4096)


def has_panicked(server: Path, service: Service) -> bool:
    """Begin a new file of the write-ahead log, and say whether PostgreSQL has given up for lack of space for one."""
    with suppress(psycopg.OperationalError), psycopg.connect(conninfo(server, "postgres"), autocommit=True) as db:
        db.execute("SELECT pg_logical_emit_message(true, 'test', 'something to log')")
        db.execute("SELECT pg_switch_wal()")
    return "No space left on device" in service.log()
