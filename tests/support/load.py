"""Clients that write to a service and remember what it acknowledged."""

import asyncio
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import httpx
import psycopg

from tests.support.problems import assert_problem
from tests.support.processes import wait_until
from tests.support.service import Service

PAUSE = 0.05  # seconds between a client's failure and its next try


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


class Clients:
    """Threads that go on until they are stopped, at the end of a block for instance."""

    def __init__(self, run: Callable[[], None], threads: int) -> None:
        """Start them."""
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=run) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def __enter__(self) -> Self:
        """Give it; at the end of the block it stops."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def stop(self) -> None:
        """Wait for the last answers."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()


class Load(Clients):
    """Clients that create tasks one after the other, each over a keep-alive connection of its own."""

    def __init__(self, service: Service, clients: int) -> None:
        """Start them."""
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
        """Count the answers to what was sent since a moment, by their status."""
        return Counter(call.status for call in list(self.calls) if call.started >= since)

    def first_success(self, since: float) -> float:
        """Wait until a create is done that was sent since a moment, and give the seconds from there to its end."""
        wait_until(lambda: self.statuses(since)[httpx.codes.CREATED] > 0)
        done = [call.ended for call in self.calls if call.started >= since and call.status == httpx.codes.CREATED]
        return min(done) - since

    def in_vain(self, since: float) -> float:
        """Give for how many seconds its clients have asked in vain since a moment, by the pauses that they made.

        A clock would show how busy the machine is, too: there, clients ask less often.
        """
        statuses = self.statuses(since)
        return PAUSE * (statuses.total() - statuses[httpx.codes.CREATED]) / len(self.threads)


def create(client: httpx.Client) -> Call:
    """Create a task with a title that no other has."""
    title = uuid.uuid4().hex
    started = time.monotonic()
    try:
        response, error = client.post("/api/tasks", json={"title": title}), None
    except httpx.TransportError as failure:
        response, error = None, failure
    return Call(title, started, time.monotonic(), response, error)


def assert_acknowledged_once(calls: Sequence["Call | Exchange"], conninfo: str) -> None:
    """Check that each task that was acknowledged is in the database, and that nothing is there twice or unasked."""
    with psycopg.connect(conninfo) as db:
        stored = Counter(title for (title,) in db.execute("SELECT title FROM tasks"))
    acknowledged = {call.title for call in calls if call.title and call.status == httpx.codes.CREATED}
    assert acknowledged
    assert acknowledged - set(stored) == set()
    assert set(stored) - {call.title for call in calls} == set()
    assert max(stored.values()) == 1


def assert_unavailable(call: Call) -> None:
    """Check that a call was answered with the problem of a database that is away, and with when to try again."""
    assert call.response is not None
    assert_problem(call.response, 503, "database_unavailable")
    assert int(call.response.headers["Retry-After"]) >= 1


@dataclass(frozen=True)
class Exchange:
    """A request of a raw client and what came of it; times are monotonic."""

    kind: str  # create, toggle, get, list; connect where there was no connection to send it on
    title: str  # of a create
    started: float
    ended: float
    outcome: str  # answered; refused; unanswered: the connection ended; cut: within the answer; another's: not its own
    first: bool = True  # on its connection
    status: int = 0
    closing: bool = False  # the answer announced that the connection closes


class Crowd(Clients):
    """Keep-alive clients in one thread, cheap enough for thousands, that see what becomes of their connections."""

    def __init__(self, service: Service, clients: int, kinds: Sequence[str] = ("create",), pause: float = 0) -> None:
        """Start them; each sends one request of these kinds after the other, and is slow to close by a pause."""
        self.port, self.kinds, self.pause = service.port, kinds, pause
        self.shared = create(service.client)  # the task that all toggle
        assert self.shared.response
        self.path = f"/api/tasks/{self.shared.response.json()['id']}"
        self.exchanges: list[Exchange] = []
        self.ended_idle: Counter[str] = Counter()
        super().__init__(lambda: asyncio.run(self._run(clients)), 1)

    def outcomes(self, since: float = 0) -> Counter[str]:
        """Count what came of the requests that ended since a moment."""
        return Counter(exchange.outcome for exchange in self.exchanges if exchange.ended >= since)

    def statuses(self) -> Counter[int]:
        """Count the answers by their status."""
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
            if reader.at_eof() or reader.exception():  # a client looks before it sends
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
        # Where a request was answered twice, the next one finds the second answer.
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
        headers = f"Host: todo\r\nX-Request-ID: {name}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        return f"{line} HTTP/1.1\r\n{headers}\r\n\r\n{body}".encode()

    def assert_nothing_lost(self, conninfo: str) -> None:
        """Check that each write that was acknowledged happened once, and nothing that was not sent."""
        assert self.outcomes()["another's"] == 0
        assert_acknowledged_once([self.shared, *self.exchanges], conninfo)
        with psycopg.connect(conninfo) as db:
            row = db.execute("SELECT version - 1 FROM tasks WHERE title = %s", [self.shared.title]).fetchone()
        toggles = Counter(exchange.status for exchange in self.exchanges if exchange.kind == "toggle")
        assert row
        unknown = toggles[0] + toggles[httpx.codes.SERVICE_UNAVAILABLE]
        assert toggles[httpx.codes.OK] <= row[0] <= toggles[httpx.codes.OK] + unknown


def at_once(service: Service, count: int, call: Callable[[httpx.Client, int], httpx.Response]) -> list[httpx.Response]:
    """Make calls at the same time, each over a connection of its own."""

    def one(number: int) -> httpx.Response:
        with httpx.Client(base_url=service.url, timeout=60, verify=False) as client:
            return call(client, number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))
