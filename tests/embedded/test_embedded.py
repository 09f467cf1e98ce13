"""The PostgreSQL of one's own: it starts wherever DATA_DIR is, survives every kill, and harms nothing around it."""

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.processes import postmaster_in, servers_in, wait_until
from tests.support.service import Service
from todo_api import cluster

ODD_NAME = """it's "my" $(touch pwned); `x` é"""
NOBODY = 65534

# As root, some tests need a user who is not: one who may look into closed folders, as the interpreter or pytest's
# folder may be in one, but may write no more than anybody else.
AS_USER = (
    [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    ]
    if os.geteuid() == 0
    else []
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a DATA_DIR whose server was stopped, to copy: that is faster than a first start."""
    data_dir = tmp_path_factory.mktemp("stopped") / "data"
    service = Service(data_dir.with_name("log"), DATA_DIR=data_dir).wait()
    assert service.stop() == 0
    return data_dir


@pytest.fixture
def data_dir(tmp_path: Path, stopped: Path) -> Path:
    """Give a test a DATA_DIR of its own that was in use before."""
    return copy(stopped, tmp_path / "data")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service for the first time in an oddly named folder, among variables that mean other servers."""
    folder = tmp_path_factory.mktemp("odd")
    strange: dict[str, Any] = {
        "PGPORT": 1,
        "PGHOST": "nowhere.invalid",
        "PGHOSTADDR": "192.0.2.1",
        "PGUSER": "root",
        "PGDATABASE": "x",
    }
    strange |= {"PGOPTIONS": "-c no_such_setting=1", "PGSERVICE": "nothing", "PGSSLMODE": "verify-full", "PGDATA": "/x"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        service = Service(folder / "log", DATA_DIR=folder / ODD_NAME, **strange).wait()
        yield service
        assert service.stop() == 0
    assert servers_in(folder) == []


def copy(source: Path, target: Path) -> Path:
    """Copy a folder with its owners, modes and whatever it holds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def create(service: Service) -> int:
    """Create a task and give its id."""
    answer = service.client.post("/api/tasks", json={"title": "Buy milk"})
    assert answer.status_code == 201, answer.text
    task_id: int = answer.json()["id"]
    return task_id


def has(service: Service, task_id: int) -> bool:
    """Say whether the service knows a task."""
    return service.answers(f"/api/tasks/{task_id}")


def stop_all(services: Iterable[Service]) -> list[int]:
    """Stop services at the same time and give their exit statuses."""
    for service in services:
        service.process.terminate()
    return [service.stop() for service in services]


def psql_line(service: Service) -> str:
    """Find the line for psql that the service logs at its start; the last one, where it was started twice."""
    lines: list[str] = re.findall(r"yours to look into: (.*)", service.log())
    return lines[-1]


def socket_folder(service: Service) -> Path:
    """Find the folder of the socket in the line for psql."""
    folder = re.search(r"host=(\S+)", psql_line(service))
    assert folder
    return Path(folder[1])


def query(service: Service, sql: str) -> str:
    """Run the line for psql as a person would, pasted into a shell."""
    line = f"{psql_line(service)} -X -A -t -c '{sql}'"
    done = subprocess.run(["sh", "-c", line], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def owner(path: Path) -> int:
    """Give the user id that owns a file."""
    return path.lstat().st_uid


def permissions(path: Path) -> int:
    """Give the permission bits of a file."""
    return stat.S_IMODE(path.lstat().st_mode)


# ---- where it may be


def test_first_start_works_in_a_folder_with_an_odd_name_and_runs_nothing_of_it(odd: Service) -> None:
    assert has(odd, create(odd))
    assert (odd.log_file.parent / ODD_NAME / "postgres" / "PG_VERSION").exists()
    places = {Path.cwd(), ROOT, odd.log_file.parent, odd.log_file.parent / ODD_NAME, Path.home(), Path("/")}
    assert [place for place in places if (place / "pwned").exists()] == []


def test_the_logged_psql_line_works_when_it_is_pasted_into_a_shell(odd: Service) -> None:
    assert query(odd, "select 1") == "1"


def test_variables_that_mean_another_server_do_not_disturb_it(odd: Service) -> None:
    # The fixture sets them; each alone would break the start or send the service to another server.
    assert query(odd, "select current_user || current_database()") == "todotodo"
    assert has(odd, create(odd))


def test_the_server_listens_on_no_network_address(odd: Service) -> None:
    servers = servers_in(odd.log_file.parent, "net_connections")
    assert servers
    assert [server.info["net_connections"] for server in servers if server.info["net_connections"]] == []
    assert query(odd, "show listen_addresses") == ""


def test_only_the_servers_own_user_can_reach_its_socket(odd: Service) -> None:
    folder = odd.log_file.parent / ODD_NAME / "postgres"
    assert [permissions(folder), permissions(folder / ".s.PGSQL.5432")] == [0o700, 0o700]


def test_the_services_role_is_no_superuser(odd: Service) -> None:
    rights = "select rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls from pg_roles"
    assert query(odd, rights + " where rolname = current_user") == "f|f|f|f|f"


def test_a_long_path_gets_a_private_socket_folder_that_is_used_again_and_removed(
    tmp_path: Path, stopped: Path, start: Start
) -> None:
    data_dir = copy(stopped, tmp_path / "long" / ("x" * 60) / ("y" * 60) / "data")
    service = start(DATA_DIR=data_dir).wait()
    folder = socket_folder(service)
    assert not folder.is_relative_to(data_dir)
    assert (permissions(folder), owner(folder)) == (0o700, owner(data_dir / "postgres"))
    task_id = create(service)

    service.kill()
    service = start(DATA_DIR=data_dir).wait()
    assert (socket_folder(service), has(service, task_id)) == (folder, True)

    service.kill()
    postmaster_in(tmp_path).kill()
    wait_until(lambda: not servers_in(tmp_path))
    service = start(DATA_DIR=data_dir).wait()
    assert (socket_folder(service), has(service, task_id)) == (folder, True)

    assert service.stop() == 0
    assert not folder.exists()


def test_a_path_with_a_comma_gets_a_socket_folder_too(tmp_path: Path, stopped: Path, start: Start) -> None:
    data_dir = copy(stopped, tmp_path / "one,two")  # libpq takes it for two hosts
    first, second = start(DATA_DIR=data_dir), start(DATA_DIR=data_dir)
    assert has(second.wait(), create(first.wait()))
    folder = socket_folder(first)
    assert stop_all([first, second]) == [0, 0]
    assert not folder.exists()


def test_a_folder_that_is_not_ours_gets_one_clear_line(tmp_path: Path, start: Start) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)  # root's, or without the right to write
    service = start(DATA_DIR=closed / "data", prefix=AS_USER)
    assert service.process.wait(timeout=30) != 0
    assert_one_line(service, "DATA_DIR", "Permission denied")


def test_a_file_in_the_place_of_the_folder_gets_one_clear_line(tmp_path: Path, start: Start) -> None:
    (tmp_path / "data").touch()
    service = start(DATA_DIR=tmp_path / "data")
    assert service.process.wait(timeout=30) != 0
    assert_one_line(service, "DATA_DIR", "File exists")


def test_a_folder_with_a_line_break_gets_one_clear_line(tmp_path: Path, start: Start) -> None:
    service = start(DATA_DIR=tmp_path / "two\nlines")
    assert service.process.wait(timeout=30) != 0
    assert_one_line(service, "newline")


def assert_one_line(service: Service, *parts: str) -> None:
    """Check that a start that failed says why, in a line for people."""
    lines = [line for line in service.log().splitlines() if line.startswith("todo_api: ")]
    assert len(lines) == 1, service.log()
    assert [part for part in parts if part not in lines[0]] == []
    assert "Traceback" not in service.log()


def test_with_a_database_url_the_data_folder_is_never_touched(tmp_path: Path, start: Start, database_url: str) -> None:
    service = start(DATABASE_URL=database_url, DATA_DIR=tmp_path / "data").wait()
    assert service.stop() == 0
    assert not (tmp_path / "data").exists()


# ---- what may be killed


def test_tasks_survive_a_sigkill_of_whatever(tmp_path: Path, stopped: Path, start: Start) -> None:
    victims = ["the process group", "the master", "the postmaster and the process group"]
    services = {victim: start(DATA_DIR=copy(stopped, tmp_path / victim)) for victim in victims}
    tasks = {victim: create(service.wait()) for victim, service in services.items()}
    for victim, service in services.items():
        if "postmaster" in victim:
            postmaster_in(tmp_path / victim).kill()
        if "group" in victim:
            service.kill()
        service.stop(signal.SIGKILL)

    again = {victim: start(DATA_DIR=tmp_path / victim) for victim in victims}
    for victim, service in again.items():
        assert has(service.wait(), tasks[victim]), victim
    assert stop_all(again.values()) == [0, 0, 0]
    assert servers_in(tmp_path) == []


def test_a_start_that_is_killed_during_initdb_is_repaired_by_the_next(tmp_path: Path, start: Start) -> None:
    victims = ["the process group", "the master"]
    for victim in victims:
        service = start(DATA_DIR=tmp_path / victim)
        wait_until(partial(has_begun, tmp_path / victim))
        if "group" in victim:
            service.kill()
        service.stop(signal.SIGKILL)  # of the master only, initdb goes on for a while
    for service in [start(DATA_DIR=tmp_path / victim) for victim in victims]:
        assert has(service, create(service.wait()))
    assert [victim for victim in victims if (tmp_path / victim / "postgres.new").exists()] == []


def has_begun(data_dir: Path) -> bool:
    """Say whether initdb has begun to make a cluster; on a busy machine it may be done before anybody looks."""
    return any(data_dir.glob("postgres*/PG_VERSION"))


def test_a_half_made_cluster_is_made_anew(tmp_path: Path, start: Start) -> None:
    half = tmp_path / "data" / "postgres.new"
    (half / "base").mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    service = start(DATA_DIR=tmp_path / "data").wait()
    assert has(service, create(service))
    assert not half.exists()


def test_sigterm_and_sigint_leave_no_process(tmp_path: Path, stopped: Path, start: Start) -> None:
    numbers = [signal.SIGTERM, signal.SIGINT]
    services = [start(DATA_DIR=copy(stopped, tmp_path / number.name)).wait() for number in numbers]
    assert servers_in(tmp_path)
    assert [service.stop(number) for service, number in zip(services, numbers, strict=True)] == [0, 0]
    assert servers_in(tmp_path) == []
    assert [service.log() for service in services if "Traceback" in service.log()] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_middle_of_the_start_leaves_no_process(
    number: signal.Signals, tmp_path: Path, data_dir: Path, start: Start
) -> None:
    (data_dir / "postgres.log").unlink()
    service = start(DATA_DIR=data_dir)
    wait_until((data_dir / "postgres.log").exists)  # made just before the server's process
    assert service.stop(number) == 0
    assert servers_in(tmp_path) == []
    assert "Traceback" not in service.log()


def test_a_damaged_postmaster_pid_is_repaired(tmp_path: Path, stopped: Path, start: Start) -> None:
    services = []
    for number, content in enumerate(["", "4711", "4711\n/nowhere\n1\n5432\n\n", "\n" * 6]):
        data_dir = copy(stopped, tmp_path / str(number))
        (data_dir / "postgres" / "postmaster.pid").write_text(content)
        services.append(start(DATA_DIR=data_dir))
    for service in services:
        assert has(service, create(service.wait()))


def test_a_stranger_whom_left_over_files_name_is_left_alone(data_dir: Path, start: Start) -> None:
    # After a crash process ids are given out anew, in a container the same few again and again.
    as_owner = AS_USER if owner(data_dir / "postgres") != os.geteuid() else []
    stranger = subprocess.Popen([*as_owner, "sleep", "600"])
    try:
        lines = f"{stranger.pid}\n{data_dir}/postgres\n1700000000\n5432\n{data_dir}/postgres\n"
        (data_dir / "postgres" / "postmaster.pid").write_text(lines)
        (data_dir / "postgres" / ".s.PGSQL.5432.lock").write_text(lines)
        service = start(DATA_DIR=data_dir).wait()
        assert has(service, create(service))
        assert stranger.poll() is None
        assert service.stop() == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_copy_of_a_folder_in_use_gets_a_server_of_its_own(
    tmp_path: Path, data_dir: Path, stopped: Path, start: Start
) -> None:
    original = start(DATA_DIR=data_dir).wait()
    duplicate = copy(stopped, tmp_path / "copy")
    shutil.copy(data_dir / "postgres" / "postmaster.pid", duplicate / "postgres")
    service = start(DATA_DIR=duplicate).wait()
    create(service)
    assert original.client.get("/api/tasks").json() == []


def test_a_server_that_somebody_started_by_hand_is_used_and_its_socket_folder_kept(
    tmp_path: Path, data_dir: Path, start: Start
) -> None:
    sockets = Path(tempfile.mkdtemp())
    try:
        (sockets / "precious").touch()
        sockets.chmod(0o777)
        as_owner = AS_USER if owner(data_dir / "postgres") != os.geteuid() else []
        by_hand = subprocess.Popen(
            [*as_owner, cluster.BIN / "postgres", "-D", data_dir / "postgres", "-h", "", "-k", sockets],
            cwd="/",
            stderr=subprocess.DEVNULL,
        )
        wait_until((sockets / ".s.PGSQL.5432").exists)
        service = start(DATA_DIR=data_dir).wait()
        assert socket_folder(service) == sockets
        assert service.stop() == 0
        assert by_hand.wait(timeout=30) == 0
        assert servers_in(tmp_path) == []
        assert [file.name for file in sockets.iterdir()] == ["precious"]
    finally:
        shutil.rmtree(sockets)


def test_a_stop_after_the_folder_was_deleted_leaves_no_process(tmp_path: Path, data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    assert servers_in(tmp_path)
    shutil.rmtree(data_dir)
    assert service.stop() == 0
    assert servers_in(tmp_path) == []
    assert "Traceback" not in service.log()


# ---- who shares it, who runs it


def test_two_services_share_a_server_which_stops_with_the_last_of_them(
    tmp_path: Path, data_dir: Path, start: Start
) -> None:
    first, second = start(DATA_DIR=data_dir), start(DATA_DIR=data_dir)
    first.wait()
    second.wait()
    assert has(second, create(first))
    server = postmaster_in(tmp_path)

    assert first.stop() == 0
    assert has(second, create(second))
    assert postmaster_in(tmp_path) == server

    assert second.stop() == 0
    assert servers_in(tmp_path) == []


def test_the_server_is_not_root_and_nothing_around_its_folder_changes(tmp_path: Path, start: Start) -> None:
    closed = tmp_path / "closed" / "inner"
    closed.mkdir(parents=True)
    for folder in (closed, closed.parent):
        folder.chmod(0o700)
    around = [closed, *closed.parents, ROOT, cluster.BIN, *cluster.BIN.parents]
    before = [(path, owner(path), permissions(path)) for path in around]

    service = start(DATA_DIR=closed / "data").wait()
    assert has(service, create(service))
    expected = NOBODY if os.geteuid() == 0 else os.geteuid()
    servers = servers_in(tmp_path, "uids")
    assert {server.info["uids"].effective for server in servers} == {expected}
    assert {server.info["uids"].saved for server in servers} == {expected}
    assert service.stop() == 0
    assert [(path, owner(path), permissions(path)) for path in around] == before
    assert [path.name for path in closed.iterdir()] == ["data"]


def test_it_works_for_a_user_who_is_not_root(tmp_path: Path, start: Start) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if os.geteuid() == 0:
        os.chown(home, NOBODY, NOBODY)
    options = {"DATA_DIR": home / "data", "HOME": home, "prefix": AS_USER}
    service = start(**options).wait()
    task_id = create(service)
    assert psutil.Process(service.process.pid).uids().effective != 0
    assert {owner(file) for file in home.rglob("*")} == {owner(home)}

    service.kill()
    service = start(**options).wait()
    assert has(service, task_id)
    assert service.stop() == 0
    assert servers_in(tmp_path) == []
