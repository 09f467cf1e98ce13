"""Clients that write to a service and record its responses."""

import asyncio
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, Self

import httpx
import psycopg

from tests.support.problems import assert_problem
from tests.support.processes import wait_until
from tests.support.service import Service

PAUSE = 0.05  # seconds between a client's failure and its next try


@dataclass(frozen=True)
class Call:
    """A create that was sent, and its response or the error of its connection. Times are those of time.monotonic()."""

    title: str
    started: float
    ended: float
    response: httpx.Response | None
    error: httpx.TransportError | None

    @property
    def status(self) -> int:
        """The status of the response, or 0 if there was none."""
        return self.response.status_code if self.response else 0


class Clients:
    """Threads that run until they are stopped, for example at the end of a ``with`` block."""

    def __init__(self, run: Callable[[], None], threads: int) -> None:
        """Start the threads, which must end once ``stopping`` is set."""
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=run) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def __enter__(self) -> Self:
        """Return the clients themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the clients."""
        self.stop()

    def stop(self) -> None:
        """Stop the clients, and wait for the last responses."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()


class Served(Protocol):
    """What clients call: a service, or something in front of one."""

    url: str


class Load(Clients):
    """Clients that create tasks one after the other, each over its own keep-alive connection."""

    def __init__(self, service: Served, clients: int) -> None:
        """Start the clients."""
        self.service = service
        self.calls: list[Call] = []
        super().__init__(self._write, clients)

    def _write(self) -> None:
        with httpx.Client(base_url=self.service.url, timeout=60, verify=False) as client:
            while not self.stopping.is_set():
                call = create(client)
                self.calls.append(call)
                if call.status != httpx.codes.CREATED:
                    time.sleep(PAUSE)

    def statuses(self, since: float = 0) -> Counter[int]:
        """Count the calls that were sent since a moment by status; 0 stands for those without a response."""
        return Counter(call.status for call in list(self.calls) if call.started >= since)

    def first_success(self, since: float) -> float:
        """Return the seconds from a moment to the end of the first success of a create that was sent since then."""
        wait_until(lambda: self.statuses(since)[httpx.codes.CREATED] > 0)
        done = [call.ended for call in self.calls if call.started >= since and call.status == httpx.codes.CREATED]
        return min(done) - since

    def failing_seconds(self, since: float) -> float:
        """Return the seconds for which the clients have failed since a moment, from the number of their pauses.

        A clock would also measure the load of the machine: under load, the clients send less often.
        """
        statuses = self.statuses(since)
        return PAUSE * (statuses.total() - statuses[httpx.codes.CREATED]) / len(self.threads)


def create(client: httpx.Client) -> Call:
    """Create a task with a unique title."""
    title = uuid.uuid4().hex
    started = time.monotonic()
    try:
        response, error = client.post("/api/tasks", json={"title": title}), None
    except httpx.TransportError as failure:
        response, error = None, failure
    return Call(title, started, time.monotonic(), response, error)


def assert_acknowledged_once(calls: Sequence["Call | Exchange"], conninfo: str) -> None:
    """Check that the database has each acknowledged task, no task twice, and no task that was not sent."""
    with psycopg.connect(conninfo) as db:
        stored = Counter(title for (title,) in db.execute("SELECT title FROM tasks"))
    acknowledged = {call.title for call in calls if call.title and call.status == httpx.codes.CREATED}
    assert acknowledged
    assert acknowledged - set(stored) == set()
    assert set(stored) - {call.title for call in calls} == set()
    assert max(stored.values()) == 1


def assert_unavailable(call: Call) -> None:
    """Check that the response is the problem of an unavailable database, with a Retry-After header."""
    assert call.response is not None
    assert_problem(call.response, 503, "database_unavailable")
    assert int(call.response.headers["Retry-After"]) >= 1


@dataclass(frozen=True)
class Exchange:
    """A request of a raw client and its outcome. Times are those of time.monotonic()."""

    kind: str  # create, toggle, get, list; or connect, if the connection was refused
    title: str  # of the created task, otherwise empty
    started: float
    ended: float
    # answered; refused: no connection; unanswered: the connection ended before the response; cut: it ended within the
    # response; another's: the response belongs to another request
    outcome: str
    first: bool = True  # whether it is the first request on its connection
    status: int = 0
    closing: bool = False  # whether the response has Connection: close


class Crowd(Clients):
    """Keep-alive clients in one thread that record how their connections end. Thousands of them are cheap enough."""

    def __init__(
        self,
        service: Service,
        clients: int,
        kinds: Sequence[str] = ("create",),
        *,
        pause: float = 0,
        keep_alive: bool = True,
    ) -> None:
        """Start the clients. Each sends random ``kinds`` of requests, and waits ``pause`` seconds before it closes."""
        self.port, self.kinds, self.pause, self.keep_alive = service.port, kinds, pause, keep_alive
        self.shared = create(service.client)  # all clients toggle this task
        assert self.shared.response
        self.path = f"/api/tasks/{self.shared.response.json()['id']}"
        self.exchanges: list[Exchange] = []
        self.ended_idle: Counter[str] = Counter()
        super().__init__(lambda: asyncio.run(self._run(clients)), 1)

    def outcomes(self, since: float = 0) -> Counter[str]:
        """Count the requests that ended after a moment by outcome."""
        return Counter(exchange.outcome for exchange in self.exchanges if exchange.ended >= since)

    def statuses(self) -> Counter[int]:
        """Count the responses by status."""
        return Counter(exchange.status for exchange in self.exchanges if exchange.outcome == "answered")

    async def _run(self, clients: int) -> None:
        await asyncio.gather(*(self._client() for _ in range(clients)))

    async def _client(self) -> None:
        while not self.stopping.is_set():
            started = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                self.exchanges.append(Exchange("connect", "", started, time.monotonic(), "refused"))
                await asyncio.sleep(PAUSE)
                continue
            await self._use(reader, writer)
            await asyncio.sleep(self.pause)
            writer.close()

    async def _use(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = True
        while not self.stopping.is_set():
            if reader.at_eof() or reader.exception():  # as a client checks a connection before it reuses it
                self.ended_idle["reset" if reader.exception() else "closed"] += 1
                return
            exchange = await self._exchange(reader, writer, random.choice(self.kinds), first=first)
            self.exchanges.append(exchange)
            if exchange.outcome != "answered" or exchange.closing:
                return
            first = False

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str, *, first: bool
    ) -> Exchange:
        name = uuid.uuid4().hex
        title = name if kind == "create" else ""
        started = time.monotonic()
        writer.write(self._request(kind, title, name))
        head = body = b""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().lower().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if line)
            body = await reader.readexactly(int(headers["content-length"]))
        except (OSError, asyncio.IncompleteReadError) as error:
            outcome = "cut" if head or getattr(error, "partial", b"") else "unanswered"
            return Exchange(kind, title, started, time.monotonic(), outcome, first)
        status = int(lines[0].split()[1])
        # If a request gets two responses, the next request reads the second one.
        own = headers["x-request-id"] == name and (status != httpx.codes.CREATED or title.encode() in body)
        outcome = "answered" if own else "another's"
        closing = headers.get("connection") == "close"
        return Exchange(kind, title, started, time.monotonic(), outcome, first, status, closing)

    def _request(self, kind: str, title: str, name: str) -> bytes:
        body = f'{{"title": "{title}"}}' if title else ""
        line = {
            "create": "POST /api/tasks",
            "toggle": f"POST {self.path}/toggle",
            "get": f"GET {self.path}",
            "list": "GET /api/tasks",
        }[kind]
        headers = f"X-Request-ID: {name}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        if not self.keep_alive:
            headers += "\r\nConnection: close"
        return f"{line} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n{body}".encode()

    def assert_nothing_lost(self, conninfo: str) -> None:
        """Check that each acknowledged write took effect once, and that no other write took effect."""
        assert self.outcomes()["another's"] == 0
        assert_acknowledged_once([self.shared, *self.exchanges], conninfo)
        with psycopg.connect(conninfo) as db:
            row = db.execute("SELECT version - 1 FROM tasks WHERE title = %s", [self.shared.title]).fetchone()
        toggles = Counter(exchange.status for exchange in self.exchanges if exchange.kind == "toggle")
        assert row
        unknown = toggles[0] + toggles[httpx.codes.SERVICE_UNAVAILABLE]
        assert toggles[httpx.codes.OK] <= row[0] <= toggles[httpx.codes.OK] + unknown


def at_once(service: Service, count: int, call: Callable[[httpx.Client, int], httpx.Response]) -> list[httpx.Response]:
    """Make concurrent calls, each over its own connection, and return the responses."""

    def one(number: int) -> httpx.Response:
        with httpx.Client(base_url=service.url, timeout=60, verify=False) as client:
            return call(client, number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))
