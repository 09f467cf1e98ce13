"""The service stops, reloads and loses workers under load: what was accepted is answered, once, and nothing is lost."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.support.databases import as_url
from tests.support.fixtures import Figure, Start
from tests.support.load import Crowd
from tests.support.postgres import Postgres, connections
from tests.support.processes import postmaster_in, servers_in, wait_until
from tests.support.service import Service, workers

KINDS = ("create", "create", "toggle", "get")
TASKS = b"POST /api/tasks HTTP/1.1\r\nHost: todo\r\nContent-Type: application/json\r\n"
HALF_A_BODY = TASKS + b'Content-Length: 21\r\n\r\n{"title"'


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL, which stays when a service stops."""
    running = Postgres(tmp_path_factory.mktemp("stopping") / "server")
    yield running
    running.stop()


@pytest.fixture
def begin(postgres: Postgres, start: Start) -> Callable[..., Service]:
    """Give a function that starts a service of two workers on an empty database."""

    def begin(**settings: object) -> Service:
        service = start(**{"DATABASE_URL": as_url(postgres.conninfo), "WEB_CONCURRENCY": 2, **settings}).wait()
        wait_until(lambda: len(workers(service)) == settings.get("WEB_CONCURRENCY", 2))
        if "DATA_DIR" not in settings:
            with psycopg.connect(postgres.conninfo) as db:
                db.execute("DELETE FROM tasks")
        return service

    return begin


def embedded(data_dir: Path) -> str:
    """Give the connection string of the database in a DATA_DIR."""
    return f"host={data_dir / 'postgres'} port=5432 user=todo dbname=todo"


def connect(service: Service, data: bytes) -> socket.socket:
    """Open a connection and send something."""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    connection.sendall(data)
    return connection


def pids(service: Service) -> set[int]:
    """Give the ids of its workers."""
    return {worker.pid for worker in workers(service)}


def all_gone(before: set[int], service: Service) -> bool:
    """Say whether other workers have taken the place of some."""
    return not before & pids(service) and len(pids(service)) == 2


# As docker stop has it, and as systemd has it: the master is told, or the workers are, too.
@pytest.mark.parametrize("tell", [os.kill, os.killpg])
def test_sigterm_answers_all_that_was_accepted_and_ends_with_0(
    tell: Callable[[int, int], None], begin: Callable[..., Service], postgres: Postgres, figure: Figure
) -> None:
    service = begin()
    with Crowd(service, 24, KINDS) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 300)
        moment = time.monotonic()
        tell(service.process.pid, signal.SIGTERM)
        assert service.process.wait(timeout=30) == 0
        wait_until(lambda: crowd.outcomes(moment)["refused"] > 0)
    outcomes = crowd.outcomes(moment)
    figure(f"SIGTERM ({tell.__name__}): what clients saw from then on", str(dict(outcomes)))
    assert set(crowd.statuses()) == {200, 201}
    assert set(outcomes) == {"answered", "refused"}
    assert crowd.ended_idle["reset"] == 0
    crowd.assert_nothing_lost(postgres.conninfo)


def test_while_it_stops_idle_clients_may_ask_once_more_and_new_ones_are_refused_at_once(
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
    assert service.process.wait(timeout=30) == 0


def accepts(service: Service) -> bool:
    """Say whether it takes a new connection."""
    try:
        connect(service, b"").close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_that_do_not_end_delay_a_stop_for_10_s_at_most(
    number: signal.Signals, begin: Callable[..., Service], tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    service = begin(DATABASE_URL="", DATA_DIR=data_dir)
    halves = [connect(service, part) for part in [HALF_A_BODY, TASKS, b"POST /api"] * 4]
    db = psycopg.connect(embedded(data_dir))
    db.execute("LOCK tasks")
    halves.append(connect(service, b"GET /api/tasks HTTP/1.1\r\nHost: todo\r\n\r\n"))
    moment = time.monotonic()
    assert service.stop(number) == 0
    assert time.monotonic() - moment < 25  # PostgreSQL's stop is in it; gunicorn by itself would give them 30 s
    db.close()
    assert servers_in(data_dir) == []
    assert "Traceback" not in service.log()
    for connection in halves:
        connection.close()


def test_ctrl_c_under_load_ends_with_0_and_loses_nothing_that_was_acknowledged(
    begin: Callable[..., Service], postgres: Postgres
) -> None:
    service = begin()
    with Crowd(service, 24, KINDS) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 300)
        os.killpg(service.process.pid, signal.SIGINT)
        assert service.process.wait(timeout=30) == 0
    crowd.assert_nothing_lost(postgres.conninfo)


def reload(service: Service) -> None:
    """Send SIGHUP and wait until all workers are others."""
    before = pids(service)
    service.process.send_signal(signal.SIGHUP)
    wait_until(partial(all_gone, before, service))


@pytest.mark.long
def test_three_reloads_under_load_cost_no_request_though_clients_are_slow_to_close(
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
    crowd.assert_nothing_lost(embedded(data_dir))
    assert service.stop() == 0


def test_a_reload_costs_no_request_though_it_takes_a_second_to_connect_to_the_database(
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


def test_workers_that_are_killed_cost_the_requests_at_work_in_them_and_no_other(
    begin: Callable[..., Service], tmp_path: Path, figure: Figure
) -> None:
    service = begin(DATABASE_URL="", DATA_DIR=tmp_path / "data")
    clients, kills = 24, 4
    with Crowd(service, clients, KINDS) as crowd:
        for _ in range(kills):
            time.sleep(0.5)
            killed = workers(service)[0]
            killed.kill()
            wait_until(partial(all_gone, {killed.pid}, service))
    lost = crowd.outcomes()["unanswered"] + crowd.outcomes()["cut"]
    figure(f"a worker SIGKILLed, {kills} times, {clients} clients: requests lost", lost)
    assert lost <= kills * clients
    assert crowd.outcomes()["refused"] == 0
    assert set(crowd.statuses()) == {200, 201}
    crowd.assert_nothing_lost(embedded(tmp_path / "data"))
    assert service.stop() == 0


def test_signals_in_quick_succession_end_in_an_orderly_stop(begin: Callable[..., Service], postgres: Postgres) -> None:
    service = begin()
    with Crowd(service, 8, KINDS) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 50)
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            service.process.send_signal(number)
            time.sleep(0.05)
        assert service.process.wait(timeout=30) == 0
    assert set(crowd.statuses()) == {200, 201}
    crowd.assert_nothing_lost(postgres.conninfo)
