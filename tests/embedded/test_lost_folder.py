"""A DATA_DIR that goes away under a running service: no new cluster, and no restart when the folder is back."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.support.containers import container
from tests.support.embedded import copy, create_task, has_task
from tests.support.fixtures import Start
from tests.support.load import create
from tests.support.processes import has_ended, postmaster_in, send, servers_in, wait_until
from tests.support.service import Service

GONE = "the cluster is gone"


def assert_unavailable(service: Service) -> None:
    """Check that the service returns a 503, and that each of its processes logs the reason at most once."""
    wait_until(lambda: not service.answers() and GONE in service.log())  # a request makes the service connect again
    for _ in range(20):
        assert create(service.client).status == httpx.codes.SERVICE_UNAVAILABLE
    assert service.log().count(GONE) == 1
    assert "Traceback" not in service.log()


def kill_server(folder: Path, service: Service) -> None:
    """Kill the server, and make the service notice it."""
    postmaster_in(folder).kill()
    wait_until(lambda: not servers_in(folder))
    wait_until(lambda: not service.answers())


def test_a_moved_folder_is_not_replaced_and_is_used_again_once_it_is_back(
    tmp_path: Path, data_dir: Path, start: Start
) -> None:
    service = start(DATA_DIR=data_dir).wait()
    task_id = create_task(service)
    data_dir.rename(tmp_path / "moved")
    kill_server(tmp_path, service)
    assert_unavailable(service)
    assert not data_dir.exists()
    (tmp_path / "moved").rename(data_dir)
    wait_until(service.answers)
    assert has_task(service, task_id)
    assert service.stop() == 0
    assert servers_in(tmp_path) == []


def test_a_deleted_folder_is_not_replaced_and_a_copy_of_it_is_used(
    tmp_path: Path, data_dir: Path, start: Start
) -> None:
    service = start(DATA_DIR=data_dir).wait()
    task_id = create_task(service)
    assert service.stop() == 0
    backup = copy(data_dir, tmp_path / "backup")
    service = start(DATA_DIR=data_dir).wait()
    shutil.rmtree(data_dir)
    kill_server(tmp_path, service)
    assert_unavailable(service)
    assert not data_dir.exists()
    copy(backup, data_dir)
    wait_until(service.answers)
    assert has_task(service, task_id)
    assert service.stop() == 0
    assert servers_in(tmp_path) == []


def test_a_copy_in_place_of_a_moved_folder_gets_its_own_server(tmp_path: Path, data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    task_id = create_task(service)
    assert service.stop() == 0
    backup = copy(data_dir, tmp_path / "backup")
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    old = postmaster_in(tmp_path)
    data_dir.rename(tmp_path / "moved")
    backup.rename(data_dir)
    servers = servers_in(tmp_path, "cmdline")
    idle = [server for server in servers if "idle" in " ".join(server.info["cmdline"] or [])]
    send(signal.SIGTERM, *idle)  # so that the service opens new connections

    def has_noticed() -> bool:
        service.answers()  # a request makes the service connect again
        return has_ended(old)

    wait_until(has_noticed)
    service.wait()
    assert has_task(service, task_id)
    assert service.stop() == 0
    assert servers_in(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="nsenter of another user's namespace takes root")
def test_an_empty_mount_point_gets_no_cluster(open_folder: Path, stopped_data_dir: Path, start: Start) -> None:
    data_dir = open_folder / "data"
    data_dir.mkdir()
    disk = copy(stopped_data_dir, open_folder / "disk")
    mount = f'mount --bind "{disk}" "{data_dir}"'
    service = start(DATA_DIR=data_dir, prefix=container(open_folder / "tmp", mount, processes=False)).wait()
    task_id = create_task(service)
    postmaster = postmaster_in(open_folder)
    inside = ["nsenter", f"--target={service.process.pid}", "--mount"]
    subprocess.run([*inside, "umount", "--lazy", data_dir], check=True)
    postmaster.kill()
    wait_until(lambda: not service.answers())
    assert_unavailable(service)
    assert list(data_dir.iterdir()) == []
    subprocess.run([*inside, "mount", "--bind", disk, data_dir], check=True)
    wait_until(service.answers)
    assert has_task(service, task_id)
    assert service.stop() == 0
