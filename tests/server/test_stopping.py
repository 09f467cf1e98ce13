"""Stops, reloads and killed workers under load: accepted requests are answered, and no acknowledged write is lost."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest

from tests.support.databases import as_url
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Figure, Start
from tests.support.load import Crowd
from tests.support.postgres import Postgres, connections
from tests.support.processes import postmaster_in, send, servers_in, wait_until
from tests.support.service import Service, workers

KINDS = ("create", "create", "toggle", "get")
TASKS = b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW_TO_START = """
import time
from todo_api.server.gunicorn_conf import *
graceful_timeout = 60
def post_fork(server, worker):
    time.sleep(2)
"""
HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF_A_BODY = TASKS + b'Content-Length: 21\r\n\r\n{"title"'


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL that does not stop with a service."""
    running = Postgres(tmp_path_factory.mktemp("stopping") / "server")
    yield running
    running.stop()


@pytest.fixture
def begin(postgres: Postgres, start: Start) -> Callable[..., Service]:
    """Return a function that starts a service, by default with two workers on a database without tasks."""

    def begin(**settings: object) -> Service:
        service = start(**{"DATABASE_URL": as_url(postgres.conninfo), "WEB_CONCURRENCY": 2, **settings}).wait()
        wait_until(lambda: len(workers(service)) == settings.get("WEB_CONCURRENCY", 2))
        if "DATA_DIR" not in settings:
            with psycopg.connect(postgres.conninfo) as db:
                db.execute("DELETE FROM tasks")
        return service

    return begin


def embedded_conninfo(data_dir: Path) -> str:
    """Return the connection string of the database in a DATA_DIR."""
    return f"host={data_dir / 'postgres'} port=5432 user=todo dbname=todo"


def connect(service: Service, data: bytes) -> socket.socket:
    """Open a connection, send data and return the connection."""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=60)
    connection.sendall(data)
    return connection


def pids(service: Service) -> set[int]:
    """Return the process ids of the workers."""
    return {worker.pid for worker in workers(service)}


def all_replaced(before: set[int], service: Service) -> bool:
    """Return whether two other workers have replaced these."""
    return not before & pids(service) and len(pids(service)) == 2


# Docker sends the signal to the master alone, systemd to the workers, too.
@pytest.mark.parametrize("keep_alive", [True, False], ids=["keep-alive", "connection per request"])
@pytest.mark.parametrize("send_signal", [os.kill, os.killpg])
def test_sigterm_answers_all_accepted_requests_and_exits_with_0(
    send_signal: Callable[[int, int], None],
    keep_alive: bool,
    begin: Callable[..., Service],
    postgres: Postgres,
    figure: Figure,
) -> None:
    service = begin()
    with Crowd(service, 24, KINDS, keep_alive=keep_alive) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 300)
        moment = time.monotonic()
        send_signal(service.process.pid, signal.SIGTERM)
        assert service.process.wait(timeout=120) == 0
        wait_until(lambda: crowd.outcomes(moment)["refused"] > 0)
    outcomes = crowd.outcomes(moment)
    figure(f"SIGTERM ({send_signal.__name__}, {keep_alive=}): outcomes after the signal", str(dict(outcomes)))
    assert set(crowd.statuses()) == {200, 201}
    assert set(outcomes) == {"answered", "refused"}
    assert crowd.ended_idle["reset"] == 0
    crowd.assert_nothing_lost(postgres.conninfo)


def test_connections_are_served_until_the_master_stops_though_the_workers_were_told_to_stop_before(
    begin: Callable[..., Service],
) -> None:
    service = begin()
    with suspended(psutil.Process(service.process.pid)):
        send(signal.SIGTERM, *workers(service))
        for _ in range(10):
            assert answers(connect(service, HEALTHZ))
        service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=120) == 0


def test_connections_that_arrive_during_a_stop_wait_for_its_end_and_are_refused_not_reset(
    begin: Callable[..., Service],
) -> None:
    service = begin()
    with suspended(*workers(service)):
        queued = connect(service, HEALTHZ)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not completes_a_handshake(service))
        late = socket.socket()
        late.settimeout(0)
        late.connect_ex(("127.0.0.1", service.port))
    assert answers(queued)
    wait_until(lambda: late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED)
    late.close()
    assert service.process.wait(timeout=120) == 0


def test_connections_that_wait_because_a_worker_has_reached_its_limit_are_served_at_a_stop(
    begin: Callable[..., Service],
) -> None:
    command = [sys.executable, "wsgi.py", "--worker-connections", "6", "--threads", "2"]
    service = begin(command=command, WEB_CONCURRENCY=1)
    accepted = [connect(service, HEALTHZ) for _ in range(6)]
    assert all(b"200 OK" in connection.recv(65_536) for connection in accepted)
    waiting = [connect(service, HEALTHZ) for _ in range(3)]
    service.process.send_signal(signal.SIGTERM)
    assert all(answers(connection) for connection in waiting)
    assert service.process.wait(timeout=120) == 0
    for connection in accepted:
        connection.close()


def test_a_socket_that_another_program_has_opened_accepts_connections_after_a_stop(postgres: Postgres) -> None:
    settings = environment(DATABASE_URL=as_url(postgres.conninfo), WEB_CONCURRENCY=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "wsgi.py", "--bind", f"fd://{listener.fileno()}"]
        for _ in range(2):
            service = subprocess.Popen(command, cwd=ROOT, env=settings, pass_fds=[listener.fileno()])
            try:
                connection = socket.create_connection(listener.getsockname(), timeout=60)
                connection.sendall(HEALTHZ)
                assert answers(connection)
            finally:
                service.terminate()
                assert service.wait(timeout=120) == 0


@contextmanager
def suspended(*processes: psutil.Process) -> Iterator[None]:
    """Suspend processes for the length of a ``with`` block."""
    send(signal.SIGSTOP, *processes)
    try:
        yield
    finally:
        send(signal.SIGCONT, *processes)


def answers(connection: socket.socket) -> bool:
    """Return whether a request over this connection gets a 200, and close the connection."""
    with connection:
        return b"200 OK" in connection.recv(65_536)


def completes_a_handshake(service: Service) -> bool:
    """Return whether the kernel completes the handshake of a new connection within half a second."""
    with socket.socket() as connection:
        connection.settimeout(0.5)
        with suppress(TimeoutError):
            connection.connect(("127.0.0.1", service.port))
            return True
        return False


# Python imports this module at its start, if it finds it.
SIGNAL_IN_DEL = """
import os, signal, psycopg

unchanged = psycopg.Connection.__del__

def __del__(self):
    psycopg.Connection.__del__ = unchanged
    os.kill(os.getpid(), signal.SIGTERM)
    unchanged(self)

psycopg.Connection.__del__ = __del__
"""


def test_a_signal_to_stop_whose_exception_python_ignores_ends_the_start(
    database_url: str, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_IN_DEL)
    service = start(DATABASE_URL=database_url, PYTHONPATH=tmp_path)
    assert service.process.wait(timeout=120) == 0
    assert "Exception ignored in" in service.log()
    assert "serving" not in service.log()


def test_a_stopping_service_serves_open_connections_once_more_and_refuses_new_ones(
    begin: Callable[..., Service],
) -> None:
    service = begin(WEB_CONCURRENCY=1)
    idle, busy = httpx.Client(base_url=service.url, verify=False), connect(service, HALF_A_BODY)
    assert idle.get("/healthz").status_code == httpx.codes.OK
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not accepts(service))
    response = idle.get("/healthz")
    assert (response.status_code, response.headers["Connection"]) == (httpx.codes.OK, "close")
    assert service.process.poll() is None
    busy.sendall(b': "Buy milk"}')
    assert b"201 CREATED" in busy.recv(65_536)
    busy.close()
    assert service.process.wait(timeout=120) == 0


def accepts(service: Service) -> bool:
    """Return whether the service accepts a new connection."""
    try:
        connect(service, b"").close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_unfinished_requests_delay_a_stop_by_10_s_at_most(
    number: signal.Signals, begin: Callable[..., Service], tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    service = begin(DATABASE_URL="", DATA_DIR=data_dir)
    halves = [connect(service, part) for part in [HALF_A_BODY, TASKS, b"POST /api"] * 4]
    db = psycopg.connect(embedded_conninfo(data_dir))
    db.execute("LOCK tasks")
    halves.append(connect(service, b"GET /api/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    moment = time.monotonic()
    assert service.stop(number) == 0
    assert time.monotonic() - moment < 25  # including the stop of PostgreSQL; gunicorn alone would wait 30 s
    db.close()
    assert servers_in(data_dir) == []
    assert "Traceback" not in service.log()
    for connection in halves:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_have_just_been_forked_stop_too(
    number: signal.Signals, start: Start, postgres: Postgres, tmp_path: Path
) -> None:
    (tmp_path / "settings.py").write_text(SLOW_TO_START)
    command = [sys.executable, "-m", "gunicorn", "-c", str(tmp_path / "settings.py"), "wsgi:app"]
    service = start(command=command, DATABASE_URL=as_url(postgres.conninfo), WEB_CONCURRENCY=2)
    wait_until(lambda: len(workers(service)) == 2)
    moment = time.monotonic()
    assert service.stop(number) == 0
    assert time.monotonic() - moment < 40  # a worker that missed the signal would be killed after 60 s


@pytest.mark.parametrize("keep_alive", [True, False], ids=["keep-alive", "connection per request"])
def test_ctrl_c_under_load_exits_with_0_and_loses_no_acknowledged_write(
    keep_alive: bool, begin: Callable[..., Service], postgres: Postgres
) -> None:
    service = begin()
    with Crowd(service, 24, KINDS, keep_alive=keep_alive) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 300)
        os.killpg(service.process.pid, signal.SIGINT)
        assert service.process.wait(timeout=120) == 0
    crowd.assert_nothing_lost(postgres.conninfo)
    assert "SIGKILL" not in service.log()  # a worker that hangs is killed after 10 s


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT]], ids=str)
def test_repeated_signals_to_stop_do_not_change_the_status(
    numbers: list[signal.Signals], start: Start, postgres: Postgres
) -> None:
    service = start(DATABASE_URL=as_url(postgres.conninfo)).wait()
    assert service.stop_repeatedly(*numbers) == 0
    assert "Traceback" not in service.log()


def reload(service: Service) -> None:
    """Send SIGHUP and wait until all workers are replaced."""
    before = pids(service)
    service.process.send_signal(signal.SIGHUP)
    wait_until(partial(all_replaced, before, service))


@pytest.mark.long
def test_no_request_fails_during_three_reloads_with_clients_that_are_slow_to_close(
    begin: Callable[..., Service], tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    service = begin(DATABASE_URL="", DATA_DIR=data_dir)
    server = postmaster_in(data_dir)
    with Crowd(service, 80, KINDS, pause=0.5) as crowd:
        for _ in range(3):
            reload(service)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) == {200, 201}
    assert crowd.ended_idle["reset"] == 0
    assert server.is_running()
    crowd.assert_nothing_lost(embedded_conninfo(data_dir))
    assert service.stop() == 0


def test_no_request_fails_during_a_reload_with_a_database_that_is_slow_to_connect(
    begin: Callable[..., Service], postgres: Postgres
) -> None:
    service = begin()
    wait_until(lambda: connections(postgres) >= 8)  # the pools are full
    with psycopg.connect(postgres.conninfo, autocommit=True) as db, Crowd(service, 16, KINDS) as crowd:
        for setting in ("SET pre_auth_delay = 1", "RESET pre_auth_delay"):
            db.execute(f"ALTER SYSTEM {setting}".encode())
            db.execute("SELECT pg_reload_conf()")
            reload(service)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) == {200, 201}
    assert service.stop() == 0


def test_a_killed_worker_loses_only_its_requests_in_progress(
    begin: Callable[..., Service], tmp_path: Path, figure: Figure
) -> None:
    service = begin(DATABASE_URL="", DATA_DIR=tmp_path / "data")
    clients, kills = 24, 4
    with Crowd(service, clients, KINDS) as crowd:
        for _ in range(kills):
            time.sleep(0.5)
            killed = workers(service)[0]
            killed.kill()
            wait_until(partial(all_replaced, {killed.pid}, service))
    lost = crowd.outcomes()["unanswered"] + crowd.outcomes()["cut"]
    figure(f"a worker killed, {kills} times, {clients} clients: lost requests", lost)
    assert lost <= kills * clients
    assert crowd.outcomes()["refused"] == 0
    assert set(crowd.statuses()) == {200, 201}
    crowd.assert_nothing_lost(embedded_conninfo(tmp_path / "data"))
    assert service.stop() == 0


def test_signals_in_quick_succession_end_in_a_clean_stop(begin: Callable[..., Service], postgres: Postgres) -> None:
    service = begin()
    with Crowd(service, 8, KINDS) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 50)
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            service.process.send_signal(number)
            time.sleep(0.05)
        assert service.process.wait(timeout=120) == 0
    assert set(crowd.statuses()) == {200, 201}
    crowd.assert_nothing_lost(postgres.conninfo)
