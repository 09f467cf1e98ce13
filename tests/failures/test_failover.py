"""A primary fails and its standby takes over: the service follows by itself, and nothing acknowledged is lost."""

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.fixtures import Figure, Start
from tests.support.load import Load, assert_acknowledged_once, assert_unavailable
from tests.support.problems import assert_quick
from tests.support.processes import servers_in, wait_until
from tests.support.replica import Pair
from tests.support.service import Service

LIMIT = 3  # seconds from the promotion to the first write, as clients count them


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Run a primary and its synchronous standby."""
    yield Pair(tmp_path)
    for process in servers_in(tmp_path):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def service(pair: Pair, start: Start) -> Service:
    """Run a service of two workers on whichever of the two servers takes writes."""
    return start(DATABASE_URL=pair.url(network=True), WEB_CONCURRENCY=2).wait()


def promote(pair: Pair, load: Load) -> float:
    """Make the standby the primary; give the seconds until a create is done that was sent after that was asked for."""
    asked = time.monotonic()
    pair.standby.promote()
    pair.swap()
    took = load.first_success(asked)
    assert load.in_vain(asked) < LIMIT
    return took


def assert_problems(load: Load) -> None:
    """Check that what was no success was the right problem."""
    assert set(load.statuses()) == {201, 503}
    for call in load.calls:
        if call.status != httpx.codes.CREATED:
            assert_unavailable(call)


def assert_quick_problems(load: Load, service: Service) -> None:
    """Check that what was no success was the right problem, for which the service took less than a second."""
    assert_problems(load)
    assert_quick(service)


@pytest.mark.parametrize("network", [True, pytest.param(False, marks=pytest.mark.long)], ids=["ports", "sockets"])
def test_the_service_follows_when_the_primary_is_killed_and_when_the_next_one_is(
    pair: Pair, start: Start, figure: Figure, network: bool
) -> None:
    service = start(DATABASE_URL=pair.url(network=network), WEB_CONCURRENCY=2).wait()
    with Load(service, 20) as load:
        time.sleep(1)
        pair.primary.crash()
        time.sleep(2)
        there = promote(pair, load)
        pair.standby.copy(pair.primary)
        time.sleep(1)
        pair.primary.crash()
        back = promote(pair, load)
        time.sleep(0.5)

    figure("Primary killed, standby promoted: first write after, ms", round(1000 * max(there, back)))
    assert_quick_problems(load, service)
    assert_acknowledged_once(load.calls, pair.primary.conninfo)


@pytest.mark.long
def test_the_service_follows_when_the_two_change_places_in_order(pair: Pair, service: Service) -> None:
    with Load(service, 20) as load:
        for _ in range(2):
            time.sleep(0.5)
            pair.primary.stop()
            promote(pair, load)
            pair.standby.follow(pair.primary)
        time.sleep(0.5)

    assert_quick_problems(load, service)
    assert_acknowledged_once(load.calls, pair.primary.conninfo)


def test_the_service_leaves_a_primary_that_takes_no_more_writes(pair: Pair, service: Service) -> None:
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


def test_the_service_leaves_a_primary_that_says_nothing(pair: Pair, service: Service, figure: Figure) -> None:
    with Load(service, 20) as load:
        time.sleep(1)
        pair.primary.send(signal.SIGSTOP)
        time.sleep(1)
        took = promote(pair, load)
        time.sleep(0.5)

    figure("Primary frozen, standby promoted: first write after, ms", round(1000 * took))
    assert_quick_problems(load, service)
    assert_acknowledged_once(load.calls, pair.primary.conninfo)


def test_without_the_standby_nothing_is_acknowledged_and_the_primary_keeps_its_connections(
    pair: Pair, service: Service
) -> None:
    with Load(service, 20) as load:
        time.sleep(1)
        pair.standby.crash()
        crashed = time.monotonic()
        time.sleep(3)
        assert service.client.get("/readyz").status_code == httpx.codes.OK
    # Commits wait for the standby without a limit, each on a connection that the service has given up.
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
