"""The database goes away and comes back: nobody waits for it, and nothing is lost."""

import re
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from todo_api import cluster, socket_folder

from .conftest import Service, as_url, assert_problem, postmaster_in, wait_until


class Postgres:
    """A PostgreSQL of the test's own, which it may kill."""

    def __init__(self, folder: Path) -> None:
        """Make it and start it."""
        self.cluster = folder.resolve() / "postgres"
        with (folder / "lock").open("w") as lock:
            cluster.create(self.cluster, lock.fileno())
        self.conninfo = f"host={self.cluster} port={socket_folder.PORT} user=postgres dbname=postgres"
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        self.process = cluster.launch(self.cluster, self.cluster)
        wait_until(self.answers)

    def answers(self) -> bool:
        """Say whether it takes connections."""
        try:
            psycopg.connect(self.conninfo).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """End it as a crash does: PostgreSQL's immediate shutdown."""
        postmaster_in(self.cluster).send_signal(signal.SIGQUIT)
        self.process.wait(timeout=60)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    running = Postgres(tmp_path)
    yield running
    cluster.stop(running.cluster)


@pytest.fixture
def outage_service(postgres: Postgres, tmp_path: Path) -> Iterator[Service]:
    """Run a service of one worker on it."""
    service = Service(tmp_path / "log", DATABASE_URL=as_url(postgres.conninfo), WEB_CONCURRENCY=1).wait()
    yield service
    assert service.stop() == 0


class Load:
    """Clients that create tasks one after the other, over connections of their own, and remember the answers."""

    def __init__(self, service: Service, clients: int) -> None:
        """Start them."""
        self.answers: list[tuple[str, httpx.Response]] = []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.create, args=[service]) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def create(self, service: Service) -> None:
        """Create tasks until it is enough."""
        with httpx.Client(base_url=service.url, timeout=60, verify=False) as client:
            while not self.stopping.is_set():
                title = uuid.uuid4().hex
                response = client.post("/api/tasks", json={"title": title})
                self.answers.append((title, response))
                if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                    time.sleep(0.05)

    def stop(self) -> None:
        """Wait for the last answers."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()


def test_through_two_outages_every_answer_is_quick_and_no_task_is_lost_or_doubled(
    postgres: Postgres, outage_service: Service
) -> None:
    load = Load(outage_service, 50)
    for _ in range(2):
        time.sleep(1)
        postgres.kill()
        time.sleep(1.5)
        assert outage_service.client.get("/healthz").status_code == httpx.codes.OK
        postgres.start()
        wait_until(lambda: load.answers[-1][1].status_code == httpx.codes.CREATED)
    time.sleep(0.5)
    load.stop()

    assert set(Counter(response.status_code for _, response in load.answers)) == {201, 503}
    for _, response in load.answers:
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            assert_problem(response, 503, "database_unavailable")
            assert int(response.headers["Retry-After"]) >= 1
    took = [float(found) for found in re.findall(r" 503 ([\d.]+)ms ", outage_service.log())]
    assert max(took) < 1000
    with psycopg.connect(postgres.conninfo) as db:
        stored = Counter(title for (title,) in db.execute("SELECT title FROM tasks"))
    acknowledged = {title for title, response in load.answers if response.status_code == httpx.codes.CREATED}
    assert acknowledged - set(stored) == set()
    assert max(stored.values()) == 1


def test_a_locked_task_is_a_503_and_stays_as_it_is(postgres: Postgres, outage_service: Service) -> None:
    task = outage_service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    path = f"/api/tasks/{task['id']}"
    with psycopg.connect(postgres.conninfo) as db:
        db.execute("SELECT 1 FROM tasks FOR UPDATE")
        for response in (outage_service.client.post(f"{path}/toggle"), outage_service.client.delete(path)):
            assert_problem(response, 503, "database_unavailable")
    assert outage_service.client.get(path).json() == task
    assert outage_service.client.post(f"{path}/toggle").status_code == httpx.codes.OK
