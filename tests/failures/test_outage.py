"""Outages of the database: requests get a quick 503 until it is back, and no task is lost."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.databases import as_url
from tests.support.fixtures import Figure
from tests.support.load import Load, assert_acknowledged_once, assert_unavailable
from tests.support.postgres import Postgres
from tests.support.problems import assert_problem, assert_quick
from tests.support.processes import children, wait_until
from tests.support.service import Service


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    running = Postgres(tmp_path / "server")
    yield running
    running.stop()


@pytest.fixture
def service(postgres: Postgres, tmp_path: Path) -> Iterator[Service]:
    """Run a service of one worker on it."""
    running = Service(tmp_path / "log", DATABASE_URL=as_url(postgres.conninfo), WEB_CONCURRENCY=1).wait()
    yield running
    assert running.stop() == 0


def test_three_outages_delay_no_request_and_lose_or_double_no_task(
    postgres: Postgres, service: Service, figure: Figure
) -> None:
    processes = process_ids(service)
    with Load(service, 50) as load:
        recoveries = [outage(postgres, service, load) for _ in range(3)]

    assert set(load.statuses()) == {201, 503}
    for call in load.calls:
        if call.status != httpx.codes.CREATED:
            assert_unavailable(call)
    # Measured by the clients, so that the wait for a thread counts, too.
    slowest = max(call.ended - call.started for call in load.calls if call.status != httpx.codes.CREATED)
    figure("PostgreSQL killed: slowest 503, ms", round(1000 * slowest))
    figure("PostgreSQL restarted: first success after, ms", round(1000 * max(recoveries)))
    assert_quick(service)
    assert_acknowledged_once(load.calls, postgres.conninfo)
    assert process_ids(service) == processes


def process_ids(service: Service) -> set[int]:
    """Return the ids of a service's processes."""
    return {child.pid for child in children(service.process.pid)} | {service.process.pid}


def outage(postgres: Postgres, service: Service, load: Load) -> float:
    """Kill PostgreSQL for a while, and return the seconds from its restart to the first success."""
    time.sleep(0.5)
    postgres.kill()
    time.sleep(1.5)
    for path in ("/healthz", "/docs"):
        assert service.client.get(path).status_code == httpx.codes.OK
    postgres.start()
    returned = time.monotonic()
    recovery = load.first_success(returned)
    wait_until(lambda: load.statuses(returned)[httpx.codes.CREATED] > 300)
    assert load.failing_seconds(returned) < 1
    settled = time.monotonic()
    wait_until(lambda: load.statuses(settled)[httpx.codes.CREATED] > 100)
    assert set(load.statuses(settled)) == {httpx.codes.CREATED}
    return recovery


def test_an_outage_is_logged_in_two_lines(postgres: Postgres, service: Service) -> None:
    def lines() -> list[str]:
        found = [line for line in service.log().splitlines() if "todo_api.database.outage" in line or "psycopg" in line]
        return [line.partition("WARNING ")[2] for line in found]

    for number in range(2):
        postgres.kill()
        for _ in range(20):
            assert_problem(service.client.get("/api/tasks"), 503, "database_unavailable")
        postgres.start()
        wait_until(service.answers)
        [away, back] = lines()[2 * number :]
        assert away.startswith(
            "todo_api.database.outage: the database cannot be reached; statements fail until it can: connection "
        )
        assert back == "todo_api.database.outage: the database can be reached again"
