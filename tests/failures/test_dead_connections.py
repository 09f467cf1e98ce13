"""No request fails because of a dead connection to PostgreSQL, and no request pays for a check of connections."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.support.databases import as_url
from tests.support.fixtures import Start
from tests.support.load import Crowd
from tests.support.postgres import Postgres, connections, terminate
from tests.support.processes import wait_until
from tests.support.service import Service


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    running = Postgres(tmp_path / "server")
    yield running
    running.stop()


@pytest.fixture
def service(postgres: Postgres, tmp_path: Path) -> Iterator[Service]:
    """Run a service of one worker on it, with all of its connections open."""
    running = Service(tmp_path / "log", DATABASE_URL=as_url(postgres.conninfo), WEB_CONCURRENCY=1).wait()
    wait_until(lambda: connections(postgres) == 4)
    yield running
    assert running.stop() == 0


def test_requests_succeed_after_the_idle_connections_are_terminated(postgres: Postgres, service: Service) -> None:
    for _ in range(10):
        wait_until(lambda: connections(postgres) == 4)
        assert terminate(postgres) == 4
        assert [service.client.get("/api/tasks").status_code for _ in range(6)] == [200] * 6
    assert "Traceback" not in service.log()


@pytest.mark.parametrize("end", [Postgres.stop, Postgres.kill])
def test_the_first_request_after_a_restart_of_postgresql_succeeds(
    end: object, postgres: Postgres, service: Service
) -> None:
    for _ in range(3):
        assert callable(end)
        end(postgres)
        postgres.process.wait(timeout=120)
        postgres.start()
        assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
        wait_until(lambda: connections(postgres) == 4)


def test_no_write_is_lost_or_doubled_when_connections_are_terminated_under_load(
    postgres: Postgres, service: Service
) -> None:
    with Crowd(service, 50, ("create", "toggle", "get", "list")) as crowd:
        ended = 0
        for _ in range(10):
            time.sleep(0.3)
            ended += terminate(postgres)
        time.sleep(0.3)
    assert set(crowd.outcomes()) == {"answered"}
    assert set(crowd.statuses()) <= {200, 201, 503}
    # At most one request per terminated connection: its statement was in progress, so its outcome is unknown.
    assert crowd.statuses()[503] <= ended
    assert crowd.statuses()[201] > 50
    assert "Traceback" not in service.log()
    with psycopg.connect(postgres.conninfo) as db:
        titles = [title for (title,) in db.execute("SELECT title FROM tasks")]
    created = {x.title for x in crowd.exchanges if x.status == httpx.codes.CREATED}
    assert created <= set(titles)
    assert len(titles) == len(set(titles))


class Relay:
    """A relay between a service and PostgreSQL that counts how often the service waits for a response."""

    def __init__(self, folder: Path, target: Path) -> None:
        """Listen on a Unix socket with the name that libpq expects."""
        self.target = str(target)
        self.round_trips = 0
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / ".s.PGSQL.5432"))
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.target)
            threading.Thread(target=self._count, args=(client, server), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client), daemon=True).start()

    def _pass_on(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):  # the thread of the other direction may have closed it
            while data := source.recv(65_536):
                to.sendall(data)
        to.close()

    def _count(self, client: socket.socket, server: socket.socket) -> None:
        stream = client.makefile("rb")
        length = stream.read(4)  # the first message has no type
        server.sendall(length + stream.read(struct.unpack("!I", length)[0] - 4))
        while len(head := stream.read(5)) == 5:
            # PostgreSQL responds to a Sync or a Query with ReadyForQuery.
            self.round_trips += head[:1] in {b"S", b"Q"}
            server.sendall(head + stream.read(struct.unpack("!I", head[1:])[0] - 4))
        server.close()


def test_a_request_is_one_round_trip_to_the_database(postgres: Postgres, tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "relay"
    folder.mkdir()
    relay = Relay(folder, postgres.cluster / ".s.PGSQL.5432")
    url = as_url(f"host={folder} port=5432 user=postgres dbname=postgres")
    service = start(DATABASE_URL=url).wait()
    path = f"/api/tasks/{service.client.post('/api/tasks', json={'title': 'Buy milk'}).json()['id']}"
    wait_until(lambda: connections(postgres) == 4)
    for _ in range(20):  # until each connection has prepared the statement
        service.client.get(path)
    before = relay.round_trips
    assert [service.client.get(path).status_code for _ in range(100)] == [200] * 100
    assert relay.round_trips - before == 100
    assert service.stop() == 0
