"""The server: ``python wsgi.py``, gunicorn with settings of one's own, and how both start, reload and stop."""

import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median

import httpx
import pytest

from tests.support.environment import ROOT
from tests.support.fixtures import Start
from tests.support.processes import free_port, postmaster_in, servers_in, wait_until
from tests.support.service import Service, workers

GUNICORN = [sys.executable, "-m", "gunicorn"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a DATA_DIR that was in use before, and stop the server that the last killed service leaves there."""
    folder = tmp_path_factory.mktemp("server") / "data"
    for log in ("before", "after"):
        service = Service(folder.with_name(log), DATA_DIR=folder, WEB_CONCURRENCY=1).wait()
        assert service.stop() == 0
        assert servers_in(folder) == []
        if log == "before":
            yield folder


CLIENTS = 32


def test_python_wsgi_py_becomes_gunicorn_with_the_same_process_id(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    wait_until(lambda: len(workers(service)) == 2)
    assert "with 2 workers of 4 threads" in service.log()
    assert service.client.get("/healthz").headers["Server"] == "gunicorn"


OWN_SETTINGS = [
    ["-w", "2", "--threads", "2"],
    [],  # one synchronous worker
    ["--preload"],
]


@pytest.mark.parametrize("arguments", OWN_SETTINGS, ids=" ".join)
def test_gunicorn_with_settings_of_ones_own_works_on_the_embedded_server(
    arguments: list[str], data_dir: Path, start: Start
) -> None:
    port = free_port()
    command = [*GUNICORN, "-b", f"127.0.0.1:{port}", *arguments, "wsgi:app"]
    service = start(command=command, PORT=port, DATA_DIR=data_dir).wait()
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
    assert service.stop() == 0
    assert servers_in(data_dir) == []
    assert "Traceback" not in service.log()


def test_arguments_of_python_wsgi_py_go_to_gunicorn(data_dir: Path, start: Start) -> None:
    port = free_port()
    command = [sys.executable, "wsgi.py", "--bind", f"127.0.0.1:{port}", "--threads", "3"]
    # PORT is taken, which is no matter since --bind goes before it.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = start(command=command, PORT=taken.getsockname()[1], DATA_DIR=data_dir)
        service.client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        service.wait()
    assert f"serving http://127.0.0.1:{port}, its docs at /docs, with 1 workers of 3 threads" in service.log()


def test_the_folder_that_it_is_started_in_does_not_matter(tmp_path: Path, start: Start) -> None:
    project = tmp_path / "project"
    for name in ("todo_api", "sql"):
        shutil.copytree(ROOT / name, project / name)
    shutil.copy(ROOT / "wsgi.py", project)
    (tmp_path / "elsewhere").mkdir()

    service = start(command=[sys.executable, str(project / "wsgi.py")], cwd=tmp_path / "elsewhere").wait()
    created = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    assert service.stop() == 0
    service = start(command=[sys.executable, "wsgi.py"], cwd=project).wait()
    assert service.client.get("/api/tasks").json() == [created]
    assert (project / ".data" / "postgres").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_port_in_use_gets_one_line_whoever_has_it(tmp_path: Path, data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        ports = [service.port, stranger.getsockname()[1]]
        for refused in [start(DATA_DIR=tmp_path / "data", PORT=port) for port in ports]:
            assert refused.process.wait(timeout=30) != 0
            assert refused.log().count("\n") == 1, refused.log()
            assert "PORT" in refused.log()
    assert not (tmp_path / "data").exists()
    assert service.answers()


def test_a_service_that_was_killed_can_be_started_again_at_once(data_dir: Path, start: Start) -> None:
    killed = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    killed.stop(signal.SIGKILL)  # the workers need a moment to notice, and hold the port until then
    wait_until(start(DATA_DIR=data_dir, PORT=killed.port).serves)


def test_workers_whose_master_is_gone_say_goodbye_to_clients_that_ask_on(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=1).wait()
    with httpx.Client(base_url=service.url) as asking:
        assert asking.get("/healthz").headers["Connection"] == "keep-alive"
        service.process.kill()
        wait_until(lambda: asking.get("/healthz").headers["Connection"] == "close")


def test_a_stop_waits_for_no_thread_that_has_nothing_to_do(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    service.process.terminate()
    assert service.process.wait(timeout=8) == 0  # it gives requests at work 10 s


def test_clients_that_come_at_once_are_shared_out_among_the_workers(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    wait_until(lambda: len(workers(service)) == 2 and min(shares(service)) > 0)  # both are ready
    seen = []
    for _ in range(30):
        seen.append(shares(service))
        time.sleep(0.05)
    # In most of them: where others keep the processors busy, one of the workers may not have its turn in time.
    assert median(map(min, seen)) >= CLIENTS / 8, seen


def shares(service: Service) -> list[int]:
    """Let clients come at once and give how many of them each worker has."""
    clients = [socket.create_connection(("127.0.0.1", service.port), timeout=30) for _ in range(CLIENTS)]
    for client in clients:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n")
    assert all(client.recv(65_536).startswith(b"HTTP/1.1 200") for client in clients)
    held = [[c.laddr.port for c in worker.net_connections("tcp4")].count(service.port) for worker in workers(service)]
    for client in clients:
        client.close()
    return [count - 1 for count in held]  # without the listening socket


def test_clients_that_connect_and_are_silent_keep_nobody_waiting(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=1, WEB_THREADS=1).wait()
    with ExitStack() as silent:
        for _ in range(5):
            silent.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=30))
        time.sleep(0.1)  # for the worker to take them
        assert httpx.get(f"{service.url}/healthz", timeout=10).is_success  # each of them would have kept it for 5 s


def test_a_client_that_asks_without_a_pause_keeps_nobody_waiting(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=1, WEB_THREADS=1).wait()
    done = threading.Event()

    def ask() -> None:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n")
            assert client.recv(65_536).startswith(b"HTTP/1.1 200")
            while not done.is_set():
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n")
                client.recv(65_536)

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask)
        try:
            for _ in range(20):
                assert httpx.get(f"{service.url}/healthz", timeout=10).is_success
        finally:
            done.set()
        asking.result()


@pytest.mark.parametrize("way", ["2>&-", "2>/dev/full"])
def test_a_log_that_cannot_be_written_costs_no_request(way: str, data_dir: Path, start: Start) -> None:
    command = ["sh", "-c", f'exec "$0" wsgi.py {way}', sys.executable]
    service = start(DATA_DIR=data_dir, command=command).wait()
    for _ in range(100):
        assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED


@pytest.mark.parametrize("clients", [1, 16])  # more than there are threads
def test_requests_that_were_sent_along_with_another_are_answered_in_their_order(
    clients: int, data_dir: Path, start: Start
) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=1).wait()
    paths = [f"/nope/{number}" for number in range(30)]

    def ask(_: int) -> list[str]:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
            for path in paths:
                client.send(f"GET {path} HTTP/1.1\r\nHost: todo\r\n\r\n".encode(), socket.MSG_MORE)
            client.sendall(b"GET /nope/last HTTP/1.1\r\nHost: todo\r\nConnection: close\r\n\r\n")
            with client.makefile("rb") as answers:
                return re.findall(r'"instance": "([^"]*)"', answers.read().decode())

    with ThreadPoolExecutor(clients) as threads:
        assert list(threads.map(ask, range(clients))) == [[*paths, "/nope/last"]] * clients


# An application in which a request may end its thread.
ENDING = """
import sys
from wsgi import app
answer = app.wsgi_app
app.wsgi_app = lambda environ, start: sys.exit() if environ["PATH_INFO"] == "/end" else answer(environ, start)
"""


def test_a_request_that_would_end_its_thread_costs_no_other(data_dir: Path, start: Start, tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text(ENDING)
    command = [*GUNICORN, "-c", "python:todo_api.gunicorn_conf", "ending:app"]
    service = start(DATA_DIR=data_dir, command=command, PYTHONPATH=tmp_path, WEB_CONCURRENCY=1, WEB_THREADS=1).wait()
    for _ in range(3):
        with pytest.raises(httpx.RemoteProtocolError):
            service.client.get("/end")
    assert service.client.get("/healthz").is_success
    assert "SystemExit" in service.log()


def test_an_answer_comes_in_one_piece(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        for _ in range(200):
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n")
            head, _, body = client.recv(65_536).partition(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}\r\n".encode() in head
            assert body


def test_redirects_keep_the_path_that_the_service_is_mounted_at(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, SCRIPT_NAME="/todo")

    def answers() -> bool:
        with suppress(httpx.TransportError):
            return service.client.get("/todo/healthz").is_success
        return False

    wait_until(answers)
    assert service.client.get("/todo/").headers["Location"] == "/todo/docs"


def test_a_reload_keeps_serving(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    wait_until(lambda: len(workers(service)) == 2)
    before = {worker.pid for worker in workers(service)}
    server = postmaster_in(data_dir)
    service.process.send_signal(signal.SIGHUP)

    def reloaded() -> bool:
        assert service.client.get("/readyz").status_code == httpx.codes.OK
        return not before & {worker.pid for worker in workers(service)}

    wait_until(reloaded)
    assert server.is_running()
    assert service.stop() == 0


def test_ctrl_c_stops_everything_without_a_traceback(data_dir: Path, start: Start) -> None:
    port = free_port()
    by_hand = [*GUNICORN, "-b", f"127.0.0.1:{port}", "-w", "2", "wsgi:app"]
    services = [start(DATA_DIR=data_dir, WEB_CONCURRENCY=2), start(DATA_DIR=data_dir, PORT=port, command=by_hand)]
    wait_until(lambda: [len(workers(service.wait())) for service in services] == [2, 2])
    for service in services:
        os.killpg(service.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        assert service.process.wait(timeout=30) == 0
        assert "Traceback" not in service.log()
    assert servers_in(data_dir) == []


def test_a_worker_that_is_killed_is_replaced_and_leaves_the_server_alone(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    server = postmaster_in(data_dir)
    [worker] = workers(service)
    worker.kill()
    wait_until(lambda: [w for w in workers(service) if w.pid != worker.pid] != [])
    wait_until(service.answers)
    assert server.is_running()


def test_gunicorn_with_settings_of_ones_own_answers_with_problems_only(data_dir: Path, start: Start) -> None:
    port = free_port()
    service = start(command=[*GUNICORN, "-b", f"127.0.0.1:{port}", "wsgi:app"], PORT=port, DATA_DIR=data_dir).wait()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Type: application/problem+json" in answer
    assert service.stop() == 0


def test_it_listens_on_a_unix_socket(tmp_path: Path, data_dir: Path, start: Start) -> None:
    path = tmp_path / "socket"
    service = start(command=[sys.executable, "wsgi.py", "--bind", f"unix:{path}"], DATA_DIR=data_dir)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://todo") as service.client:
        assert service.wait().answers()
    assert service.stop() == 0


def test_a_postgresql_that_is_killed_is_started_again_by_the_service(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    postmaster_in(data_dir).kill()
    wait_until(service.answers)
    assert service.client.get(f"/api/tasks/{task['id']}").json() == task
    assert service.stop() == 0
    assert servers_in(data_dir) == []
