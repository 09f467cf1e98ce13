"""Several instances of the service behind nginx share one PostgreSQL: their connections, and what users notice."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.docs.test_readme import READMES
from tests.support.databases import as_url
from tests.support.fixtures import Figure, Start
from tests.support.load import Load, assert_acknowledged_once, at_once
from tests.support.nginx import start_nginx
from tests.support.postgres import Postgres, connections
from tests.support.processes import wait_until
from tests.support.service import Service, workers

WORKERS, THREADS = 2, 4


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    """Run a PostgreSQL with an empty database."""
    running = Postgres(tmp_path / "server")
    yield running
    running.stop()


def instances(postgres: Postgres, start: Start, count: int) -> list[Service]:
    """Start instances at the same time, and wait until all of their workers are connected."""
    url = as_url(postgres.conninfo)
    options = {"DATABASE_URL": url, "WEB_CONCURRENCY": WORKERS, "WEB_THREADS": THREADS, "DATABASE_POOLER": False}
    started = [start(**options) for _ in range(count)]
    for service in started:
        service.wait()
    wait_until(lambda: connections(postgres) >= count * WORKERS * THREADS)
    return started


def rows_of_connections() -> dict[int, tuple[int, int]]:
    """Return the usual and the largest number of connections for each number of instances, as the README says."""
    text = READMES[".deploy/README.md"].partition("### Connections")[2].partition("\n### ")[0]
    assert f"| {WORKERS} workers with {THREADS} threads: usually |" in text
    rows = [list(map(int, re.findall(r"\d+", line))) for line in re.findall(r"(?m)^\| \d.*", text)]
    return {row[0]: (row[1], row[2]) for row in rows}


def test_instances_have_the_documented_connections(postgres: Postgres, start: Start) -> None:
    usual, most = rows_of_connections()[3]
    started = instances(postgres, start, 3)
    assert connections(postgres) == usual
    seen = 0
    with psycopg.connect(postgres.conninfo) as db:
        for service in started:
            service.client.post("/api/tasks", json={"title": "locked"}).raise_for_status()
        db.execute("LOCK tasks")  # all threads wait, and each worker asks PostgreSQL about it
        before = {worker.pid for worker in workers(started[0])}
        started[0].process.send_signal(signal.SIGHUP)
        for _ in range(3):
            for service in started:
                at_once(service, 2 * WORKERS * THREADS, lambda client, _: client.get("/api/tasks"))
            seen = max(seen, connections(postgres))
    wait_until(lambda: not before & {worker.pid for worker in workers(started[0])})
    assert usual < seen <= most
    assert [service.stop() for service in started] == [0, 0, 0]


def test_the_table_has_what_the_formula_says() -> None:
    text = READMES[".deploy/README.md"].partition("### Connections")[2].partition("\n### ")[0]
    assert "(instances + 1) * WEB_CONCURRENCY * (WEB_THREADS + 1)" in text
    [spare] = map(int, re.findall(r"`max_connections` exceed that by (\d+)", text))
    rows = re.findall(r"(?m)^\| \d.*", text)
    assert len(rows) > 5
    for row in rows:
        count, *given = map(int, re.findall(r"\d+", row))
        expected = []
        for number in (WORKERS, 8):
            most = (count + 1) * number * (THREADS + 1)
            expected += [count * number * THREADS, most, most + spare]
        assert given == expected


def test_a_killed_instance_costs_its_requests_in_progress_only(
    postgres: Postgres, start: Start, tmp_path: Path, figure: Figure
) -> None:
    first, second = instances(postgres, start, 2)
    nginx = start_nginx(start, tmp_path, first, second)
    with Load(nginx, 10) as load:
        wait_until(lambda: load.statuses()[201] > 200)
        first.kill()
        killed = time.monotonic()
        wait_until(lambda: load.statuses(killed + 0.5)[201] > 200)
    statuses = load.statuses()
    figure("an instance killed behind nginx: 502s of 10 clients", statuses[502])
    assert set(statuses) <= {201, 502}
    assert statuses[502] <= len(load.threads)
    assert set(load.statuses(killed + 0.5)) == {201}
    assert_acknowledged_once(load.calls, postgres.conninfo)
