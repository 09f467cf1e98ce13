"""The database goes away and comes back: nobody waits for it, and nothing is lost."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from .conftest import Service, as_url, assert_problem, wait_until
from .load import Load, assert_acknowledged_once, assert_unavailable
from .postgres import Postgres


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


def test_through_three_outages_every_answer_is_quick_and_no_task_is_lost_or_doubled(
    postgres: Postgres, service: Service
) -> None:
    with Load(service, 50) as load:
        for _ in range(3):
            time.sleep(1)
            postgres.kill()
            time.sleep(1.5)
            assert service.client.get("/healthz").status_code == httpx.codes.OK
            assert service.client.get("/docs").status_code == httpx.codes.OK
            postgres.start()
            wait_until(lambda: load.calls[-1].status == httpx.codes.CREATED)
        time.sleep(0.5)

    assert set(load.statuses()) == {201, 503}
    for call in load.calls:
        if call.status != httpx.codes.CREATED:
            assert_unavailable(call)
    took = [float(found) for found in re.findall(r" 503 ([\d.]+)ms ", service.log())]
    assert max(took) < 1000
    assert_acknowledged_once(load.calls, postgres.conninfo)


def test_a_locked_task_is_a_503_and_stays_as_it_is(postgres: Postgres, service: Service) -> None:
    task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    path = f"/api/tasks/{task['id']}"
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("SELECT 1 FROM tasks FOR UPDATE")
        for response in (service.client.post(f"{path}/toggle"), service.client.delete(path)):
            assert_problem(response, 503, "database_unavailable")
    assert service.client.get(path).json() == task
    assert service.client.post(f"{path}/toggle").status_code == httpx.codes.OK
