"""Clients that write to a service and remember what it acknowledged."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import httpx
import psycopg

from .conftest import Service, assert_problem


@dataclass(frozen=True)
class Call:
    """A create that was sent, and what came of it: an answer or an error of the connection; times are monotonic."""

    title: str
    started: float
    ended: float
    response: httpx.Response | None
    error: httpx.TransportError | None

    @property
    def status(self) -> int:
        """The status of the answer, 0 where there was none."""
        return self.response.status_code if self.response else 0


class Load:
    """Clients that create tasks one after the other, each over a keep-alive connection of its own."""

    def __init__(self, service: Service, clients: int) -> None:
        """Start them."""
        self.service = service
        self.calls: list[Call] = []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._write) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def __enter__(self) -> Self:
        """Give it; at the end of the block it stops."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _write(self) -> None:
        with httpx.Client(base_url=self.service.url, timeout=60, verify=False) as client:
            while not self.stopping.is_set():
                call = create(client)
                self.calls.append(call)
                if call.status != httpx.codes.CREATED:
                    time.sleep(0.05)

    def stop(self) -> None:
        """Wait for the last answers."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def statuses(self) -> Counter[int]:
        """Count the answers by their status."""
        return Counter(call.status for call in self.calls)


def create(client: httpx.Client) -> Call:
    """Create a task with a title that no other has."""
    title = uuid.uuid4().hex
    started = time.monotonic()
    try:
        response, error = client.post("/api/tasks", json={"title": title}), None
    except httpx.TransportError as failure:
        response, error = None, failure
    return Call(title, started, time.monotonic(), response, error)


def assert_acknowledged_once(calls: Sequence[Call], conninfo: str) -> None:
    """Check that each task that was acknowledged is in the database, and that nothing is there twice or unasked."""
    with psycopg.connect(conninfo) as db:
        stored = Counter(title for (title,) in db.execute("SELECT title FROM tasks"))
    acknowledged = {call.title for call in calls if call.status == httpx.codes.CREATED}
    assert acknowledged
    assert acknowledged - set(stored) == set()
    assert set(stored) - {call.title for call in calls} == set()
    assert max(stored.values()) == 1


def assert_unavailable(call: Call) -> None:
    """Check that a call was answered with the problem of a database that is away, and with when to try again."""
    assert call.response is not None
    assert_problem(call.response, 503, "database_unavailable")
    assert int(call.response.headers["Retry-After"]) >= 1
