"""Users, permissions, disks and file systems with which the first start works, or fails with one line."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.containers import FEW_CAPABILITIES, container
from tests.support.embedded import (
    AS_USER,
    BIN,
    NOBODY,
    UNKNOWN,
    as_user,
    assert_failed_with_one_line,
    copy,
    create_task,
    has_task,
    owner,
    permissions,
    socket_folder,
    stop_all,
)
from tests.support.fixtures import Start
from tests.support.optional_tools import missing, program
from tests.support.postgres import admit_all_roles
from tests.support.problems import assert_problem
from tests.support.processes import postmaster_in, send, servers_in, wait_until
from tests.support.service import Service
from todo_api.embedded import programs

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change owners and mount file systems")


# Makes a system call fail, as on a kernel or a file system without it. Arguments: its number, the error, the command.
REFUSING = [
    sys.executable,
    "-c",
    """
import ctypes, os, struct, sys
call, error = int(sys.argv[1]), int(sys.argv[2])
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (6, 0, 0, 0x50000 | error), (6, 0, 0, 0x7fff0000)]
code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
buffer = ctypes.create_string_buffer(code)
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # no new privileges, without which only root may refuse calls
assert libc.prctl(22, 2, filter, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execvp(sys.argv[3], sys.argv[3:])
""",
]
FLOCK = {"x86_64": 73, "aarch64": 32}


# ---- users and permissions


@pytest.mark.parametrize("umask", ["000", "077", "777"])
def test_the_umask_does_not_matter(umask: str, open_folder: Path, start: Start) -> None:
    prefix = [*FEW_CAPABILITIES, "sh", "-c", f'umask {umask}; exec "$@"', "sh"]
    service = start(prefix=prefix, DATA_DIR=open_folder / "new" / "data").wait()
    create_task(service)
    assert service.stop() == 0


def test_a_start_that_waits_for_another_process_says_so(open_folder: Path, start: Start) -> None:
    data_dir = open_folder / "data"
    data_dir.mkdir(mode=0o711)
    with (data_dir / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        service = start(DATA_DIR=data_dir)
        wait_until(lambda: "waiting for another process" in service.log())
    service.wait()
    assert service.log().count("waiting for another process") == 1
    assert service.stop() == 0


@pytest.mark.long
def test_a_stop_does_not_wait_forever_for_another_process(open_folder: Path, start: Start) -> None:
    service = start(DATA_DIR=open_folder / "data").wait()
    task_id = create_task(service)
    with (open_folder / "data" / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        service.process.terminate()
        assert service.process.wait(timeout=90) == 0
    assert "is not stopped: another process has held" in service.log()
    service = start(DATA_DIR=open_folder / "data").wait()
    assert has_task(service, task_id)
    assert service.stop() == 0
    assert servers_in(open_folder) == []


def test_a_start_ends_a_shutdown_that_waits_for_another_service(
    open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = copy(stopped_data_dir, open_folder / "data")
    first = start(DATA_DIR=data_dir).wait()
    task_id = create_task(first)
    postmaster = postmaster_in(open_folder)
    send(signal.SIGTERM, postmaster)  # PostgreSQL's smart shutdown waits for the connections of the service
    second = start(DATA_DIR=data_dir).wait()
    assert "which starts up, shuts down or does not respond" in second.log()
    assert postmaster_in(open_folder) != postmaster
    assert has_task(second, task_id)
    assert has_task(first.wait(), task_id)
    assert stop_all([first, second]) == [0, 0]
    assert servers_in(open_folder) == []


def test_a_start_waits_for_a_server_that_recovers_for_long(
    open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = copy(stopped_data_dir, open_folder / "data")
    (data_dir / "postgres" / "standby.signal").touch()  # it recovers forever
    with (data_dir / "postgres" / "postgresql.conf").open("a") as settings:
        settings.write("hot_standby = off\n")
    first = start(DATA_DIR=data_dir)
    wait_until(lambda: "which starts up" in first.log())
    first.kill()
    postmaster = postmaster_in(open_folder)
    second = start(DATA_DIR=data_dir)
    wait_until(lambda: "which starts up, shuts down or does not respond" in second.log())
    time.sleep(5)  # a shutdown would be ended by now
    assert postmaster_in(open_folder) == postmaster
    assert second.stop() == 0
    assert servers_in(open_folder) == []


def test_a_stop_that_cannot_open_its_lock_stops_the_server(
    open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = copy(stopped_data_dir, open_folder / "data")
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", data_dir], check=True)
    service = start(DATA_DIR=data_dir, prefix=AS_USER).wait()
    create_task(service)
    (data_dir / "start.lock").chmod(0)
    assert service.stop() == 0
    assert servers_in(open_folder) == []
    assert "Traceback" not in service.log()
    assert "database system is shut down" in (data_dir / "postgres.log").read_text()


@as_root
def test_a_user_can_start_a_service_that_root_has_started(
    open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = copy(stopped_data_dir, open_folder / "data")
    subprocess.run(["chown", "-R", f"{UNKNOWN}:{UNKNOWN}", data_dir], check=True)
    (data_dir / "start.lock").unlink()
    for prefix in ([], as_user(UNKNOWN)):
        service = start(DATA_DIR=data_dir, prefix=prefix).wait()
        create_task(service)
        assert service.stop() == 0
        assert {path for path in data_dir.iterdir() if owner(path) != UNKNOWN} == set()
    # An earlier version gave the log to root.
    os.chown(data_dir / "postgres.log", 0, 0)
    service = start(DATA_DIR=data_dir, prefix=as_user(UNKNOWN)).wait()
    assert has_task(service, create_task(service))
    assert service.stop() == 0


@as_root
@pytest.mark.parametrize("name", ["start.lock", "users.lock", "server.lock", "postgres/postgres.log"])
def test_root_follows_no_links_in_a_folder_of_a_user(
    name: str, open_folder: Path, data_dir: Path, start: Start
) -> None:
    secret = open_folder / "secret"
    secret.write_text("of root")
    secret.chmod(0o640)
    before = secret.stat()
    (data_dir / name).unlink(missing_ok=True)
    (data_dir / name).symlink_to(secret)
    subprocess.run(["chown", "--no-dereference", "-R", f"{UNKNOWN}:{UNKNOWN}", data_dir], check=True)
    service = start(DATA_DIR=data_dir)
    wait_until(lambda: service.process.poll() is not None or service.answers())
    if service.process.poll() is None:
        service.kill()
    assert secret.read_text() == "of root"
    after = secret.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


@as_root
def test_processes_of_nobody_cannot_use_the_server_of_root(open_folder: Path, start: Start) -> None:
    service = start(DATA_DIR=open_folder / "data").wait()
    psql: list[str | Path] = [BIN / "psql", "-h", open_folder / "data" / "postgres", "-U", "todo", "-c", "SELECT 1"]
    assert subprocess.run(psql, check=False, capture_output=True).returncode == 0
    refused = subprocess.run([*AS_USER, *psql], check=False, capture_output=True, text=True)
    assert "Permission denied" in refused.stderr
    assert service.stop() == 0


@as_root
def test_a_cluster_that_belongs_to_nobody_gets_a_user_of_its_own(
    open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = copy(stopped_data_dir, open_folder / "data")
    elsewhere = open_folder / "wal"
    (data_dir / "postgres" / "pg_wal").rename(elsewhere)
    (data_dir / "postgres" / "pg_wal").symlink_to(elsewhere)
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", data_dir / "postgres", elsewhere], check=True)
    foreign = open_folder / "foreign"
    (foreign / "inner").mkdir(parents=True)
    (foreign / "file").touch()
    (data_dir / "postgres" / "link").symlink_to(foreign)  # as a process of nobody may have made it
    os.link(foreign / "file", data_dir / "postgres" / "file")
    service = start(DATA_DIR=data_dir).wait()
    create_task(service)
    assert {owner(path) for path in (data_dir / "postgres", elsewhere, *elsewhere.iterdir())}.isdisjoint({0, NOBODY})
    assert {owner(path) for path in (foreign, *foreign.iterdir())} == {0}
    assert service.stop() == 0


@as_root
def test_a_user_without_a_passwd_entry_can_make_a_first_start(open_folder: Path, start: Start) -> None:
    os.chown(open_folder, UNKNOWN, UNKNOWN)
    for _ in range(2):
        service = start(DATA_DIR=open_folder / "data", prefix=as_user(UNKNOWN)).wait()
        assert has_task(service, create_task(service))
        assert {file.lstat().st_uid for file in (open_folder / "data").rglob("*")} == {UNKNOWN}
        assert service.stop() == 0
    assert servers_in(open_folder) == []


@as_root
def test_a_user_without_a_passwd_entry_and_without_user_namespaces_fails_with_one_line(
    open_folder: Path, start: Start
) -> None:
    os.chown(open_folder, UNKNOWN, UNKNOWN)
    unshare = {"x86_64": 272, "aarch64": 97}[os.uname().machine]  # Docker forbids this system call
    service = start(DATA_DIR=open_folder / "data", prefix=[*as_user(UNKNOWN), *REFUSING, str(unshare), "1"])
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, f"the user id {UNKNOWN} has no entry in /etc/passwd", "DATABASE_URL")
    assert not (open_folder / "data" / "postgres").exists()


def test_a_cluster_that_was_opened_to_its_group_is_closed_again(tmp_path: Path, data_dir: Path, start: Start) -> None:
    subprocess.run(["chmod", "-R", "g+rwX,g+s", data_dir], check=True)  # as Kubernetes' fsGroup does
    service = start(DATA_DIR=data_dir).wait()
    assert has_task(service, create_task(service))
    assert permissions(data_dir / "postgres") == 0o700
    assert service.stop() == 0


@as_root
def test_the_error_for_a_cluster_of_another_user_names_both_users(
    open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    copied = copy(stopped_data_dir, open_folder / "by_root")
    subprocess.run(["chown", "-R", "root:root", copied], check=True)
    foreign = copy(stopped_data_dir, open_folder / "foreign")
    foreign.chmod(0o777)
    subprocess.run(["chown", "-R", f"{UNKNOWN}:{UNKNOWN}", foreign / "postgres"], check=True)
    by_root, by_nobody = start(DATA_DIR=copied), start(DATA_DIR=foreign, prefix=AS_USER)
    assert [by_root.process.wait(timeout=120), by_nobody.process.wait(timeout=60)] == [3, 3]
    assert_failed_with_one_line(by_root, "belongs to root", f"chown -R {NOBODY}:{NOBODY} {copied}/postgres")
    users = f"belongs to the user id {UNKNOWN}; it must belong to the user nobody (id {NOBODY}), who runs the service"
    assert_failed_with_one_line(by_nobody, users, "chown -R")


def test_the_error_has_the_hint_of_postgresql(data_dir: Path, start: Start) -> None:
    label = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/FF000060\n"
    (data_dir / "postgres" / "backup_label").write_text(label)
    service = start(DATA_DIR=data_dir)
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, "FATAL: ", "required checkpoint record", "HINT: If you are restoring")


def test_a_missing_part_of_the_cluster_is_named(data_dir: Path, start: Start) -> None:
    shutil.rmtree(data_dir / "postgres" / "pg_wal")
    service = start(DATA_DIR=data_dir)
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, 'required WAL directory "pg_wal" does not exist')


def test_a_cluster_of_another_version_is_named_with_both_versions(data_dir: Path, start: Start) -> None:
    (data_dir / "postgres" / "PG_VERSION").write_text("12\n")
    service = start(DATA_DIR=data_dir)
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(
        service, f"PostgreSQL 12 created {data_dir}/postgres", f"has PostgreSQL {programs.find(None).major}"
    )
    assert not (data_dir / "postgres.log.1").exists()


@pytest.mark.parametrize("link", ["data", "data/postgres"])
def test_a_link_to_a_folder_that_is_not_mounted_is_named(link: str, tmp_path: Path, start: Start) -> None:
    path = tmp_path / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "volume")
    before = {file: file.lstat().st_ctime_ns for file in tmp_path.iterdir()}
    service = start(DATA_DIR=tmp_path / "data")
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, f"{path} is a link to {tmp_path}/volume, which does not exist")
    assert {file: file.lstat().st_ctime_ns for file in before} == before
    assert not (tmp_path / "volume").exists()


# ---- disks and file systems


def almost_full(data_dir: Path, source: Path, room: int) -> str:
    """Return a script that mounts a file system with a copy of a DATA_DIR and so many free KiB."""
    data_dir.mkdir()
    mount = f'mount -t tmpfs -o size=100m tmpfs "{data_dir}"; cp -a "{source}/." "{data_dir}"'
    mount += f'; head -c {room}k /dev/zero >"{data_dir}/room"'
    return mount + f'; cat /dev/zero >"{data_dir}/ball" 2>/dev/null || rm "{data_dir}/room"'


@pytest.mark.parametrize("room", [0, 4])
def test_a_disk_that_is_full_at_the_start_is_named(
    room: int, open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = open_folder / "data"
    mount = almost_full(data_dir, stopped_data_dir, room)
    service = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp", mount, processes=False))
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, "No space left on device", str(data_dir))


@as_root
def test_a_disk_that_gets_full_ends_writes_but_not_reads_until_there_is_room(
    open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = open_folder / "data"
    mount = almost_full(data_dir, stopped_data_dir, room=64)
    service = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp", mount, processes=False)).wait()
    postmaster = postmaster_in(open_folder)
    responses = [create(service)]
    while any(response.is_success for response in responses[-20:]):  # near the end, only some of them find room
        responses.append(create(service))
    created = [response.json() for response in responses if response.is_success]
    for response in responses:
        if not response.is_success:
            assert_problem(response, 503, "database_unavailable")
    assert service.client.get("/api/tasks").json() == created[::-1]
    assert "DiskFull (SQLSTATE 53100)" in service.log()

    inside(service, "rm", data_dir / "ball")
    created.append(create(service).json())
    assert service.client.get("/api/tasks").json() == created[::-1]
    assert postmaster_in(open_folder) == postmaster
    assert service.stop() == 0


@as_root
def test_a_disk_without_room_for_the_write_ahead_log_makes_503s_until_there_is_room(
    open_folder: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = open_folder / "data"
    mount = almost_full(data_dir, stopped_data_dir, room=8000)  # a file of that log has 16 MB
    service = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp", mount, processes=False)).wait()
    mounted = Path(f"/proc/{service.process.pid}/root{data_dir}")
    superuser = admit_all_roles(mounted / "postgres", postmaster_in(open_folder))
    created = []
    while (response := create(service)).status_code == httpx.codes.CREATED:
        created.append(response.json())
        subprocess.run([BIN / "psql", superuser, "--command=SELECT pg_switch_wal()"], check=False, capture_output=True)
    wait_until(lambda: not service.answers() and "No space left on device" in service.log())
    for _ in range(20):
        assert_problem(create(service), 503, "database_unavailable")
    assert service.process.poll() is None
    assert "Traceback" not in service.log()

    inside(service, "rm", data_dir / "ball")
    service.wait()
    assert service.client.get("/api/tasks").json() == created[::-1]
    assert create(service).status_code == httpx.codes.CREATED
    assert service.stop() == 0
    assert servers_in(open_folder) == []


def create(service: Service) -> httpx.Response:
    """Create a task that takes some room, and return the response."""
    return service.client.post("/api/tasks", json={"title": "Buy milk", "description": os.urandom(700).hex()})


def inside(service: Service, *command: str | Path) -> None:
    """Run a command with the file systems that a service sees."""
    enter = ["nsenter", f"--target={service.process.pid}", "--mount"]
    subprocess.run([*enter, *command], check=True, capture_output=True)


def test_a_read_only_system_without_a_temporary_folder_uses_data_dir(open_folder: Path, start: Start) -> None:
    data_dir = open_folder / "data"
    data_dir.mkdir()
    mount = f"mount -t tmpfs tmpfs {data_dir}; unset TMPDIR; mount -o remount,bind,ro /"
    mount += '; mount -o remount,ro "$0"'
    service = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp", mount, processes=False)).wait()
    assert has_task(service, create_task(service))
    assert service.stop() == 0
    assert "Traceback" not in service.log()


@pytest.mark.parametrize("error", [37, 38, 95], ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_rejected(error: int, tmp_path: Path, start: Start) -> None:
    call = FLOCK.get(os.uname().machine) or missing("the number of flock() on this machine is not known")
    service = start(DATA_DIR=tmp_path / "data", prefix=[*REFUSING, str(call), str(error)])
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, f"DATA_DIR {tmp_path}/data", "without file locks", "DATABASE_URL")
    assert not (tmp_path / "data").exists()


@pytest.fixture
def folder_without_sockets(open_folder: Path) -> Iterator[Path]:
    """Mount a file system that has no sockets: SFTP, whose server is a child process."""
    sftp = Path("/usr/lib/openssh/sftp-server")
    sshfs = program("sshfs")
    if not sftp.exists() or not os.access("/dev/fuse", os.W_OK):
        missing("sftp-server or /dev/fuse is missing")
    backing, mounted = open_folder / "backing", open_folder / "mounted"
    backing.mkdir()
    mounted.mkdir()
    os.chown(backing, NOBODY, NOBODY)
    server = subprocess.Popen([*AS_USER, sftp], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    options = "passive,allow_other,default_permissions,noforget"
    client = subprocess.Popen(
        [sshfs, f":{backing}", mounted, "-f", "-o", options], stdin=server.stdout, stdout=server.stdin
    )
    try:
        subprocess.run(
            ["timeout", "20", "sh", "-c", f'until mountpoint -q "{mounted}"; do sleep 0.1; done'], check=True
        )
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=False)
        for process in (client, server):
            process.kill()
            process.wait()


@as_root
def test_a_file_system_without_sockets_gets_a_private_socket_folder(
    folder_without_sockets: Path, stopped_data_dir: Path, start: Start
) -> None:
    data_dir = folder_without_sockets / "data"
    backing = copy(stopped_data_dir, folder_without_sockets.with_name("backing") / "data")
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", backing], check=True)
    first = start(DATA_DIR=data_dir, prefix=AS_USER).wait()
    second = start(DATA_DIR=data_dir, prefix=AS_USER).wait()
    assert has_task(second, create_task(first))
    folder = socket_folder(first)
    assert not folder.is_relative_to(data_dir)
    assert permissions(folder) == 0o700
    assert stop_all([first, second]) == [0, 0]
    assert not folder.exists()


def test_a_failed_start_leaves_no_private_socket_folder(tmp_path: Path, stopped_data_dir: Path, start: Start) -> None:
    data_dir = copy(stopped_data_dir, tmp_path / "one,two")
    with (data_dir / "postgres" / "postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = 1\n")
    temporary = Path(tempfile.mkdtemp(prefix="test-"))
    temporary.chmod(0o755)
    service = start(DATA_DIR=data_dir, TMPDIR=temporary)
    assert service.process.wait(timeout=120) == 3
    assert_failed_with_one_line(service, "contains errors")
    assert [path for path in temporary.iterdir() if path.name.startswith("todo_api-")] == []
    shutil.rmtree(temporary)
