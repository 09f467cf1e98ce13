"""Failover: the service follows to the promoted standby without a restart, and no acknowledged task is lost."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.fixtures import Figure, Start
from tests.support.load import Load, assert_acknowledged_once, assert_unavailable
from tests.support.problems import assert_quick
from tests.support.processes import send, servers_in, wait_until
from tests.support.replica import Pair
from tests.support.service import Service

LIMIT = 3  # seconds from the promotion to the first success, as clients count them


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Run a primary and its synchronous standby."""
    yield Pair(tmp_path)
    send(signal.SIGKILL, *servers_in(tmp_path))


@pytest.fixture
def service(pair: Pair, start: Start) -> Service:
    """Run a service of two workers on the server that accepts writes."""
    return start(DATABASE_URL=pair.url(network=True), WEB_CONCURRENCY=2).wait()


def promote(pair: Pair, load: Load) -> float:
    """Promote the standby. Return the seconds until the first success of a create that was sent after the request."""
    requested = time.monotonic()
    pair.standby.promote()
    pair.swap()
    took = load.first_success(requested)
    assert load.failing_seconds(requested) < LIMIT
    return took


def assert_problems(load: Load) -> None:
    """Check that there were successes and 503s, and that each 503 is the right problem."""
    assert set(load.statuses()) == {201, 503}
    for call in load.calls:
        if call.status != httpx.codes.CREATED:
            assert_unavailable(call)


def assert_quick_problems(load: Load, service: Service) -> None:
    """Check the problems, and that the service took less than a second for each 503."""
    assert_problems(load)
    assert_quick(service)


@pytest.mark.parametrize("network", [True, pytest.param(False, marks=pytest.mark.long)], ids=["ports", "sockets"])
def test_the_service_follows_two_failovers_of_killed_primaries(
    pair: Pair, start: Start, figure: Figure, network: bool
) -> None:
    service = start(DATABASE_URL=pair.url(network=network), WEB_CONCURRENCY=2).wait()
    with Load(service, 20) as load:
        time.sleep(1)
        pair.primary.crash()
        time.sleep(2)
        first_delay = promote(pair, load)
        pair.standby.copy(pair.primary)
        time.sleep(1)
        pair.primary.crash()
        second_delay = promote(pair, load)
        time.sleep(0.5)

    figure("primary killed, standby promoted: first success after, ms", round(1000 * max(first_delay, second_delay)))
    assert_quick_problems(load, service)
    assert_acknowledged_once(load.calls, pair.primary.conninfo)


@pytest.mark.long
def test_the_service_follows_planned_switchovers(pair: Pair, service: Service) -> None:
    with Load(service, 20) as load:
        for _ in range(2):
            time.sleep(0.5)
            pair.primary.stop()
            promote(pair, load)
            pair.standby.follow(pair.primary)
        time.sleep(0.5)

    assert_quick_problems(load, service)
    assert_acknowledged_once(load.calls, pair.primary.conninfo)


def test_the_service_leaves_a_primary_that_has_become_read_only(pair: Pair, service: Service) -> None:
    with Load(service, 20) as load:
        time.sleep(1)
        pair.primary.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        pair.primary.execute("SELECT pg_reload_conf()")
        time.sleep(1)
        promote(pair, load)
        time.sleep(0.5)

    assert "SQLSTATE 25006" in service.log()
    assert_quick_problems(load, service)
    assert_acknowledged_once(load.calls, pair.primary.conninfo)


def test_the_service_leaves_a_frozen_primary(pair: Pair, service: Service, figure: Figure) -> None:
    with Load(service, 20) as load:
        time.sleep(1)
        pair.primary.send(signal.SIGSTOP)
        time.sleep(1)
        took = promote(pair, load)
        time.sleep(0.5)

    figure("primary frozen, standby promoted: first success after, ms", round(1000 * took))
    assert_quick_problems(load, service)
    assert_acknowledged_once(load.calls, pair.primary.conninfo)


def test_without_the_standby_no_write_is_acknowledged_and_no_connection_stays_blocked(
    pair: Pair, service: Service
) -> None:
    with Load(service, 20) as load:
        time.sleep(1)
        pair.standby.crash()
        crashed = time.monotonic()
        time.sleep(3)
        ready = service.client.get("/readyz")
        assert ready.status_code == httpx.codes.OK, service.log()[-5000:]
    # Commits wait for the standby without a limit, on connections that the service has closed.
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    wait_until(lambda: pair.primary.execute(waiting) == 0)

    assert service.client.post("/api/tasks", json={"title": "b"}).status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert service.took(503)[-1] < 1
    assert_problems(load)
    assert {call.status for call in load.calls if call.started > crashed} == {503}
    pair.standby.start()
    wait_until(lambda: service.client.post("/api/tasks", json={"title": "a"}).status_code == httpx.codes.CREATED)
    pair.primary.execute("DELETE FROM tasks WHERE title IN ('a', 'b')")
    assert_acknowledged_once(load.calls, pair.primary.conninfo)
