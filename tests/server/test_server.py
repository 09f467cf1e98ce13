"""The server: ``python wsgi.py`` and gunicorn with other settings, how they start, serve, reload and stop."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median

import httpx
import psutil
import pytest

from tests.support.environment import ROOT
from tests.support.fixtures import Start
from tests.support.processes import children, free_port, has_ended, postmaster_in, send, servers_in, wait_until
from tests.support.service import Service, workers

GUNICORN = [sys.executable, "-m", "gunicorn"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a DATA_DIR that was in use before. At the end, stop the server that a killed service may have left."""
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
    assert "with 2 workers (4 threads each)" in service.log()
    assert service.client.get("/healthz").headers["Server"] == "gunicorn"


OTHER_SETTINGS = [
    ["-w", "2", "--threads", "2"],
    [],  # one synchronous worker
    ["--preload"],
]


@pytest.mark.parametrize("arguments", OTHER_SETTINGS, ids=" ".join)
def test_gunicorn_with_other_settings_works_with_the_embedded_postgresql(
    arguments: list[str], data_dir: Path, start: Start
) -> None:
    port = free_port()
    command = [*GUNICORN, "-b", f"127.0.0.1:{port}", *arguments, "wsgi:app"]
    service = start(command=command, PORT=port, DATA_DIR=data_dir).wait()
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
    assert service.stop() == 0
    assert servers_in(data_dir) == []
    assert "Traceback" not in service.log()


def test_arguments_of_wsgi_py_are_passed_to_gunicorn(data_dir: Path, start: Start) -> None:
    port = free_port()
    command = [sys.executable, "wsgi.py", "--bind", f"127.0.0.1:{port}", "--threads", "3"]
    # PORT is taken, but --bind overrides it.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = start(command=command, PORT=taken.getsockname()[1], DATA_DIR=data_dir)
        service.client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        service.wait()
    assert f"serving http://127.0.0.1:{port}, its docs at /docs, with 1 workers (3 threads each)" in service.log()


def test_the_working_directory_does_not_matter(tmp_path: Path, start: Start) -> None:
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


def test_a_port_in_use_stops_the_start_with_one_line(tmp_path: Path, data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    with socket.create_server(("127.0.0.1", 0)) as other_program:
        ports = [service.port, other_program.getsockname()[1]]
        for rejected in [start(DATA_DIR=tmp_path / "data", PORT=port) for port in ports]:
            assert rejected.process.wait(timeout=120) != 0
            assert rejected.log().count("\n") == 1, rejected.log()
            assert "PORT" in rejected.log()
    assert not (tmp_path / "data").exists()
    assert service.answers()


# A small program that starts another one as systemd does, with a socket that listens already.
ACTIVATE = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "wsgi.py"])
"""


@pytest.mark.parametrize("is_port_set", [True, False])
def test_systemd_can_activate_the_socket(is_port_set: bool, data_dir: Path, start: Start) -> None:
    port = free_port()
    command = [sys.executable, "-c", ACTIVATE, str(port)]
    service = start(DATA_DIR=data_dir, command=command, PORT=port if is_port_set else free_port())
    service.client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
    service.wait()
    assert f"serving http://127.0.0.1:{port}, its docs" in service.log()
    assert service.stop() == 0


@pytest.mark.parametrize("name", ["LISTEN_FDS", "LISTEN_PID"])
def test_a_wrong_number_of_sockets_stops_the_start_with_one_line(name: str, tmp_path: Path, start: Start) -> None:
    service = start(DATA_DIR=tmp_path / "data", **{name: "many"})
    assert service.process.wait(timeout=120) == 3
    assert service.log().count("\n") == 1, service.log()
    assert "LISTEN_FDS and LISTEN_PID, which systemd sets, must be numbers" in service.log()
    assert not (tmp_path / "data").exists()


def test_sigusr2_replaces_the_service_without_a_refused_request(tmp_path: Path, start: Start) -> None:
    command = [sys.executable, f"{ROOT.name}/wsgi.py"]
    service = start(DATA_DIR=tmp_path / "data", cwd=ROOT.parent, command=command).wait()
    old = service.process
    task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    old.send_signal(signal.SIGUSR2)
    wait_until(lambda: service.log().count(f"serving {service.url}, its docs") == 2)
    [new] = [child for child in workers(service) if children(child.pid)]
    try:
        old.terminate()
        while old.poll() is None:
            assert service.client.get(f"/api/tasks/{task['id']}").json() == task
        assert old.returncode == 0
        for _ in range(20):
            assert httpx.get(f"{service.url}/api/tasks/{task['id']}").json() == task
        assert "in use" not in service.log()
    finally:
        new.terminate()
        wait_until(lambda: has_ended(new))
    wait_until(lambda: servers_in(tmp_path / "data") == [])


def test_reload_says_that_new_code_needs_a_restart(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, command=[sys.executable, "wsgi.py", "--reload"]).wait()
    assert service.log().count("--reload is ignored: new code, SQL and migrations need a restart or SIGUSR2") == 1
    [worker] = workers(service)
    service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not worker.is_running())
    assert service.log().count("SIGHUP replaces the workers: new code, SQL and migrations need a restart") == 1
    assert "Reloader is on" not in service.log()


@pytest.mark.parametrize(("limit", "threads", "needed"), [(40, 4, 72), (64, 4, 72), (256, 256, 576)])
def test_too_few_open_files_stop_the_start_with_one_line(
    limit: int, threads: int, needed: int, tmp_path: Path, start: Start
) -> None:
    service = start(prefix=["prlimit", f"--nofile={limit}:{limit}"], WEB_THREADS=threads, DATA_DIR=tmp_path / "data")
    assert service.process.wait(timeout=120) == 3
    assert service.log().count("\n") == 1
    line = f"may open {limit} files, and a worker with WEB_THREADS={threads} needs {needed}: raise the limit (ulimit -n"
    assert line in service.log()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("limit", "threads", "options"),
    [(80, 4, []), (116, 4, []), (1024, 256, []), (240, 4, ["--threads", "80"])],
    ids=str,
)
def test_few_open_files_are_enough_for_fewer_clients(
    limit: int, threads: int, options: list[str], tmp_path: Path, start: Start
) -> None:
    files = ["prlimit", f"--nofile={limit}:{limit}"]
    command = [sys.executable, "wsgi.py", *options]
    service = start(command=command, prefix=files, WEB_THREADS=threads, DATA_DIR=tmp_path / "data").wait()
    with ExitStack() as opened:
        for _ in range(16):
            opened.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=60))
        assert service.client.post("/api/tasks", json={"title": "x"}).status_code == httpx.codes.CREATED
    with ExitStack() as opened:
        clients = [
            opened.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=60)) for _ in range(150)
        ]
        for client in clients:  # most of them have to wait until others are done
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\nConnection: close\r\n\r\n")
        assert all(client.recv(65_536).startswith(b"HTTP/1.1 200") for client in clients)
    for _ in range(200):  # no file is left open
        assert service.client.get("/healthz", headers={"Connection": "close"}).is_success
    assert service.stop() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers must be between 1 and 256"),
        (["--threads", "0"], "--threads must be between 1 and 256"),
        (["--threads", "5000"], "--threads must be between 1 and 256"),
        pytest.param(
            *(["--user", "nobody", "--group", "nogroup"], "set DATABASE_URL, or start the service as that user"),
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user"),
        ),
    ],
    ids=str,
)
def test_an_option_that_cannot_work_stops_the_start_with_one_line(
    options: list[str], message: str, tmp_path: Path, start: Start
) -> None:
    service = start(command=[sys.executable, "wsgi.py", *options], DATA_DIR=tmp_path / "data")
    assert service.process.wait(timeout=120) == 3
    assert re.fullmatch(f"todo_api: .*{message}\n", service.log())
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--bind=fd://77", "Bad file descriptor"),
        ("--bind=localhost:99999", "port must be 0-65535"),
        ("--worker-tmp-dir=/nonexistent", "/nonexistent doesn't exist"),
    ],
)
def test_an_option_that_gunicorn_does_not_check_stops_the_start_with_one_line(
    option: str, message: str, database_url: str, start: Start
) -> None:
    service = start(command=[sys.executable, "wsgi.py", option], DATABASE_URL=database_url)
    assert service.process.wait(timeout=120) == 3
    [line] = [line for line in service.log().splitlines() if not re.match(r"\d{4}-", line)]
    assert line.startswith("todo_api: ")
    assert message in line


SIXTY_THREADS = """
import threading, time
for _ in range(60):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user id")
def test_the_service_outlives_processes_that_cannot_be_started(database_url: str, start: Start) -> None:
    # The limit counts all threads of the real user. The effective user still is root, who may read the project.
    # A random one, because another run of the tests may use the same limit.
    as_other = ["setpriv", f"--ruid={random.randrange(100_000, 1_000_000)}", "--bounding-set=-sys_resource,-sys_admin"]
    service = start(prefix=[*as_other, "prlimit", "--nproc=60"], DATABASE_URL=database_url, WEB_CONCURRENCY=2).wait()
    # Both have started their threads: the main one, four for requests, and four of the pool of connections.
    wait_until(lambda: [worker.num_threads() for worker in workers(service)] == [9, 9])
    with subprocess.Popen([*as_other, sys.executable, "-c", SIXTY_THREADS], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout
            assert other.stdout.readline()
            send(signal.SIGKILL, *workers(service)[:1])
            wait_until(lambda: "a worker cannot be started" in service.log())
            time.sleep(2.5)  # two more attempts
            wait_until(service.answers)  # the client's open connection may lead to the killed worker
            service.process.send_signal(signal.SIGUSR2)
            wait_until(lambda: "SIGUSR2: the new service cannot be started" in service.log())
            assert service.answers()
        finally:
            other.kill()
    wait_until(lambda: len(workers(service)) == 2)
    assert service.log().count("a worker cannot be started") == 1
    assert service.stop() == 0


def test_threads_that_cannot_be_started_stop_the_start_with_a_line(database_url: str, start: Start) -> None:
    memory = ["prlimit", f"--as={1500 * 2**20}"]  # bytes; each thread reserves 8 MiB
    service = start(prefix=memory, WEB_THREADS=256, WEB_CONCURRENCY=1, DATABASE_URL=database_url)
    assert service.process.wait(timeout=120) == 3
    assert "todo_api: a worker cannot start its 256 threads" in service.log()
    assert "Traceback" not in service.log()


def test_python_without_docstrings_serves(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, PYTHONOPTIMIZE=2).wait()
    assert service.client.get("/openapi.json").json()["paths"]["/api/tasks"]["get"]["operationId"] == "list_tasks"
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED


def test_the_current_folder_may_be_gone(tmp_path: Path, data_dir: Path, start: Start) -> None:
    leaving = ["sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', tmp_path / "gone"]
    command = [sys.executable, ROOT / "wsgi.py"]
    assert start(command=command, prefix=leaving, DATA_DIR=data_dir).wait().stop() == 0


def test_closed_standard_streams_are_not_reused_for_other_files(data_dir: Path, start: Start) -> None:
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    service = start(prefix=closing, DATA_DIR=data_dir).wait()
    for process in (psutil.Process(service.process.pid), *workers(service)):
        streams = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)]
        assert streams == [Path(os.devnull)] * 3
    assert service.stop() == 0


def test_a_killed_service_can_be_restarted_at_once(data_dir: Path, start: Start) -> None:
    killed = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    killed.stop(signal.SIGKILL)  # the workers keep the port until they notice
    wait_until(start(DATA_DIR=data_dir, PORT=killed.port).serves)


def test_workers_of_a_killed_master_close_the_connections_of_active_clients(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=1).wait()
    with httpx.Client(base_url=service.url) as client:
        assert client.get("/healthz").headers["Connection"] == "keep-alive"
        service.process.kill()
        wait_until(lambda: client.get("/healthz").headers["Connection"] == "close")


def test_a_stop_does_not_wait_for_idle_threads(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    service.process.terminate()
    assert service.process.wait(timeout=8) == 0  # less than the 10 s that requests in progress get


def test_concurrent_connections_are_distributed_among_the_workers(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    wait_until(lambda: len(workers(service)) == 2 and min(connections_per_worker(service)) > 0)  # both are ready
    seen = []
    for _ in range(30):
        seen.append(connections_per_worker(service))
        time.sleep(0.05)
    # The median, because on a busy machine a worker may not get a processor in time.
    assert median(map(min, seen)) >= CLIENTS / 8, seen


def connections_per_worker(service: Service) -> list[int]:
    """Open concurrent connections and return how many of them each worker has."""
    clients = [socket.create_connection(("127.0.0.1", service.port), timeout=60) for _ in range(CLIENTS)]
    for client in clients:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n")
    assert all(client.recv(65_536).startswith(b"HTTP/1.1 200") for client in clients)
    held = [[c.laddr.port for c in worker.net_connections("tcp4")].count(service.port) for worker in workers(service)]
    for client in clients:
        client.close()
    return [count - 1 for count in held]  # without the listening socket


def test_silent_connections_do_not_delay_other_clients(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=1, WEB_THREADS=1).wait()
    with ExitStack() as silent:
        for _ in range(5):
            silent.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=60))
        time.sleep(0.1)  # until the worker has accepted them
        assert httpx.get(f"{service.url}/healthz", timeout=10).is_success  # each would have kept the thread for 5 s


def test_a_client_that_never_pauses_does_not_block_other_clients(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=1, WEB_THREADS=1).wait()
    done = threading.Event()

    def send_requests() -> None:
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n")
            assert client.recv(65_536).startswith(b"HTTP/1.1 200")
            while not done.is_set():
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n")
                client.recv(65_536)

    with ThreadPoolExecutor(1) as threads:
        client = threads.submit(send_requests)
        try:
            for _ in range(20):
                assert httpx.get(f"{service.url}/healthz", timeout=10).is_success
        finally:
            done.set()
        client.result()


@pytest.mark.parametrize("way", ["2>&-", "2>/dev/full"])
def test_requests_succeed_if_the_log_cannot_be_written(way: str, data_dir: Path, start: Start) -> None:
    command = ["sh", "-c", f'exec "$0" wsgi.py {way}', sys.executable]
    service = start(DATA_DIR=data_dir, command=command).wait()
    for _ in range(100):
        assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED


@pytest.mark.parametrize("clients", [1, 16])  # fewer and more than there are threads
def test_pipelined_requests_are_answered_in_order(clients: int, data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=1).wait()
    paths = [f"/nope/{number}" for number in range(30)]

    def send_requests(_: int) -> list[str]:
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
            for path in paths:
                client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), socket.MSG_MORE)
            client.sendall(b"GET /nope/last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            with client.makefile("rb") as responses:
                return re.findall(r'"instance": "([^"]*)"', responses.read().decode())

    with ThreadPoolExecutor(clients) as threads:
        assert list(threads.map(send_requests, range(clients))) == [[*paths, "/nope/last"]] * clients


# An application in which a request can raise SystemExit.
ENDING = """
import sys
from wsgi import app
respond = app.wsgi_app
app.wsgi_app = lambda environ, start: sys.exit() if environ["PATH_INFO"] == "/end" else respond(environ, start)
"""


def test_a_request_that_raises_system_exit_affects_no_other_request(
    data_dir: Path, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "ending.py").write_text(ENDING)
    command = [*GUNICORN, "-c", "python:todo_api.server.gunicorn_conf", "ending:app"]
    service = start(DATA_DIR=data_dir, command=command, PYTHONPATH=tmp_path, WEB_CONCURRENCY=1, WEB_THREADS=1).wait()
    for _ in range(3):
        with pytest.raises(httpx.RemoteProtocolError):
            service.client.get("/end")
    assert service.client.get("/healthz").is_success
    assert "SystemExit" in service.log()


def test_a_response_arrives_in_one_piece(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
        for _ in range(200):
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: todo\r\n\r\n")
            head, _, body = client.recv(65_536).partition(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}\r\n".encode() in head
            assert body


def test_redirects_include_the_path_at_which_the_service_is_mounted(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, SCRIPT_NAME="/todo")

    def answers() -> bool:
        with suppress(httpx.TransportError):
            return service.client.get("/todo/healthz").is_success
        return False

    wait_until(answers)
    assert service.client.get("/todo/").headers["Location"] == "/todo/docs"


def test_requests_succeed_during_a_reload(data_dir: Path, start: Start) -> None:
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


def test_ctrl_c_stops_all_processes_without_a_traceback(data_dir: Path, start: Start) -> None:
    port = free_port()
    gunicorn = [*GUNICORN, "-b", f"127.0.0.1:{port}", "-w", "2", "wsgi:app"]
    services = [start(DATA_DIR=data_dir, WEB_CONCURRENCY=2), start(DATA_DIR=data_dir, PORT=port, command=gunicorn)]
    wait_until(lambda: [len(workers(service.wait())) for service in services] == [2, 2])
    for service in services:
        os.killpg(service.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        assert service.process.wait(timeout=120) == 0
        assert "Traceback" not in service.log()
    assert servers_in(data_dir) == []


def test_a_killed_worker_is_replaced_and_postgresql_keeps_running(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir).wait()
    server = postmaster_in(data_dir)
    [worker] = workers(service)
    worker.kill()
    wait_until(lambda: [w for w in workers(service) if w.pid != worker.pid] != [])
    wait_until(service.answers)
    assert server.is_running()


def test_gunicorn_with_other_settings_responds_to_malformed_requests_with_problems(
    data_dir: Path, start: Start
) -> None:
    port = free_port()
    service = start(command=[*GUNICORN, "-b", f"127.0.0.1:{port}", "wsgi:app"], PORT=port, DATA_DIR=data_dir).wait()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        response = connection.recv(65_536)
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Type: application/problem+json" in response
    assert service.stop() == 0


def test_the_service_listens_on_a_unix_socket(tmp_path: Path, data_dir: Path, start: Start) -> None:
    path = tmp_path / "socket"
    service = start(command=[sys.executable, "wsgi.py", "--bind", f"unix:{path}"], DATA_DIR=data_dir)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as service.client:
        assert service.wait().answers("/api/tasks")
    assert service.stop() == 0


def test_the_service_restarts_a_killed_postgresql(data_dir: Path, start: Start) -> None:
    service = start(DATA_DIR=data_dir, WEB_CONCURRENCY=2).wait()
    task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    killed = postmaster_in(data_dir)
    killed.kill()
    killed.wait()
    # Each worker notices by itself that its connections have ended.
    wait_until(lambda: service.client.get(f"/api/tasks/{task['id']}").json() == task)
    wait_until(lambda: postmaster_in(data_dir) != killed)
    assert service.stop() == 0
    assert servers_in(data_dir) == []
