"""DRAIN_SECONDS: load balancers see that the service is about to stop, and no request fails meanwhile."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.fixtures import Figure, Start
from tests.support.load import Crowd, Load, assert_acknowledged_once
from tests.support.nginx import start_nginx
from tests.support.problems import assert_problem
from tests.support.processes import children, has_ended, send, servers_in, wait_until
from tests.support.service import Service, workers

LONG = 3600  # seconds; no test waits for them
Database = psycopg.Connection[TupleRow]


@pytest.fixture
def begin(start: Start, database_url: str) -> Callable[..., Service]:
    """Return a function that starts a service with two workers, by default with a long time to drain."""

    def begin(**options: Any) -> Service:
        settings = {"DATABASE_URL": database_url, "WEB_CONCURRENCY": 2, "DRAIN_SECONDS": LONG, **options}
        service = start(**settings).wait()
        wait_until(lambda: len(workers(service)) == settings["WEB_CONCURRENCY"])
        return service

    return begin


def drain(service: Service) -> None:
    """Send a SIGTERM, and wait until the service drains."""
    service.process.terminate()
    wait_until(lambda: service.client.get("/readyz").status_code == httpx.codes.SERVICE_UNAVAILABLE)


def assert_drains(service: Service) -> None:
    """Check that each of many new connections is served, and that only the check of readiness fails."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=service.url, timeout=60, verify=False, limits=limits) as client:
        for _ in range(20):
            refused = client.get("/readyz")
            assert_problem(refused, 503, "draining")
            assert int(refused.headers["Retry-After"]) >= 1
            assert client.get("/healthz").status_code == httpx.codes.OK
            created = client.post("/api/tasks", json={"title": "Buy milk"})
            assert (created.status_code, created.headers["Connection"]) == (httpx.codes.CREATED, "keep-alive")


def test_everything_but_readyz_is_served_until_the_stop_begins(begin: Callable[..., Service], tmp_path: Path) -> None:
    service = begin(DATABASE_URL="", DATA_DIR=tmp_path / "data", DRAIN_SECONDS=3)
    with Crowd(service, 8, ("create", "get")) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 50)
        moment = time.monotonic()
        service.process.terminate()
        assert service.process.wait(timeout=120) == 0
    unanswered = [exchange for exchange in crowd.exchanges if exchange.outcome == "unanswered"]
    assert set(crowd.outcomes()) == {"answered", "refused"}, unanswered
    assert set(crowd.statuses()) == {200, 201}
    in_time = [exchange for exchange in crowd.exchanges if moment < exchange.started and exchange.ended < moment + 3]
    assert {exchange.outcome for exchange in in_time} == {"answered"}
    assert not any(exchange.closing for exchange in in_time)
    assert service.log().count("draining: /readyz returns 503, and the stop begins in 3 s") == 1
    assert servers_in(tmp_path / "data") == []
    assert "Traceback" not in service.log()


def test_workers_that_are_replaced_while_the_service_drains_drain_too(begin: Callable[..., Service]) -> None:
    service = begin()
    drain(service)
    before = workers(service)
    before[0].kill()
    wait_until(lambda: has_ended(before[0]) and len(workers(service)) == 2)
    assert_drains(service)
    service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not set(before) & set(workers(service)) and len(workers(service)) == 2)
    assert_drains(service)
    service.process.terminate()
    assert service.process.wait(timeout=120) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_another_signal_ends_the_draining(number: signal.Signals, begin: Callable[..., Service]) -> None:
    service = begin()
    drain(service)
    service.process.send_signal(number)
    assert service.process.wait(timeout=120) == 0
    assert "Traceback" not in service.log()


def test_sigint_alone_stops_the_service_without_draining(begin: Callable[..., Service]) -> None:
    service = begin()
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(timeout=120) == 0
    assert "draining" not in service.log()


def test_workers_that_get_the_signal_too_are_replaced_and_no_request_fails(begin: Callable[..., Service]) -> None:
    service = begin()
    with Crowd(service, 16, ("create", "get")) as crowd:
        wait_until(lambda: crowd.statuses()[201] > 50)
        before = workers(service)
        send(signal.SIGTERM, psutil.Process(service.process.pid), *before)
        wait_until(lambda: not set(before) & set(workers(service)) and len(workers(service)) == 2)
        assert_drains(service)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) == {200, 201}
    service.process.terminate()
    assert service.process.wait(timeout=120) == 0


def test_the_first_service_does_not_drain_if_a_second_one_serves_its_port(begin: Callable[..., Service]) -> None:
    service = begin(WEB_CONCURRENCY=1)
    old = service.process
    old.send_signal(signal.SIGUSR2)
    wait_until(lambda: service.log().count("serving ") == 2)
    [new] = [child for child in workers(service) if children(child.pid)]
    try:
        old.terminate()
        while old.poll() is None:
            assert httpx.get(f"{service.url}/readyz").status_code == httpx.codes.OK
        assert old.returncode == 0
        assert "draining" not in service.log()
        new.terminate()  # this one drains: nobody else serves the port
        wait_until(lambda: httpx.get(f"{service.url}/readyz").status_code == httpx.codes.SERVICE_UNAVAILABLE)
    finally:
        new.terminate()
        wait_until(lambda: has_ended(new))


@pytest.fixture
def restart(begin: Callable[..., Service]) -> Callable[[list[Service], int], None]:
    """Return a function that stops one of several services, and starts it again on its port."""

    def restart(services: list[Service], number: int) -> None:
        assert services[number].stop() == 0
        services[number] = begin(DRAIN_SECONDS=number, PORT=services[number].port)

    return restart


def test_no_request_fails_and_none_is_done_twice_while_two_services_behind_nginx_restart_in_turn(
    begin: Callable[..., Service],
    restart: Callable[[list[Service], int], None],
    start: Start,
    db: Database,
    figure: Figure,
) -> None:
    services = [begin(DRAIN_SECONDS=number) for number in range(2)]  # one of them does not drain
    nginx = start_nginx(start, services[0].log_file.parent, *services)
    with Load(nginx, 50) as load:
        for number in (0, 1, 0):
            restart(services, number)
    figure("two services behind nginx restart in turn, 50 clients: creates", len(load.calls))
    assert set(load.statuses()) == {201}
    assert_acknowledged_once(load.calls, db.info.dsn)
    assert all(service.took(201) for service in services)  # both had their share
