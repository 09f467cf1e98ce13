"""METRICS_PORT: /metrics, with the figures of all workers in Prometheus' text format.

gunicorn's master opens the port, and a thread in each worker accepts connections. The worker that accepts one responds
for all of them. So a scrape waits neither for the threads that handle requests nor for a worker that does not respond.
"""

import asyncio
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from todo_api import database
from todo_api.api import problems
from todo_api.config import VERSION
from todo_api.metrics import BOUNDS, metrics
from todo_api.server.unreadable import problem_bytes

_MOST_CLIENTS = 32  # of a worker; one more ends the oldest one
_TIMEOUT = 5.0  # seconds for a whole request and its response
_PAUSE = 1.0  # seconds between two updates of the state of the pools
_ACCEPT_TIME = 0.02  # seconds in which the last connections that were accepted become clients
_LAST_TIMEOUT = 1.0  # seconds for the scrapes that are in progress when a worker ends
_HEAD_SIZE = 8 * 1024  # bytes
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("method", "route", "status")

log = logging.getLogger(__name__)


class _Figures(Collector):
    """The figures of all workers, as prometheus_client writes them."""

    def collect(self) -> Iterator[Metric]:
        figures = metrics.read()
        requests = CounterMetricFamily(
            "todo_api_http_requests", "Requests, by the route and the status of the response.", labels=_LABELS
        )
        durations = HistogramMetricFamily(
            "todo_api_http_request_duration_seconds", "Time from a request to its response.", labels=_LABELS
        )
        bounds = [*map(str, BOUNDS), "+Inf"]
        for labels, (counts, seconds) in sorted(figures.requests.items()):
            cumulative = list(accumulate(counts))
            requests.add_metric(labels, cumulative[-1])
            durations.add_metric(labels, list(zip(bounds, cumulative, strict=True)), seconds)
        yield requests
        yield durations
        yield GaugeMetricFamily("todo_api_pool_size", "Connections to the database.", figures.size)
        yield GaugeMetricFamily("todo_api_pool_available", "Idle connections to the database.", figures.available)
        yield GaugeMetricFamily("todo_api_pool_waiting", "Requests that wait for a connection.", figures.waiting)
        yield GaugeMetricFamily(
            "todo_api_database_outage", "1 if a worker cannot reach the database, otherwise 0.", int(figures.outage)
        )
        yield InfoMetricFamily("todo_api", "The version of the service.", {"version": VERSION})


class MetricsPort:
    """The port, as a socket that all workers share."""

    def __init__(self, listener: socket.socket, memory: int) -> None:
        """Create it with a socket that listens, and the file descriptor of the figures' memory."""
        self.listener, self.memory = listener, memory
        self._registry = CollectorRegistry()
        self._registry.register(_Figures())
        self._clients: dict[asyncio.StreamWriter, None] = {}  # the oldest one first
        self._thread: threading.Thread | None = None
        self._wake: Callable[[], object] = lambda: None

    def inheritable(self) -> str:
        """Let a program that replaces this process inherit the port and the figures, and return their numbers."""
        descriptors = (self.listener.fileno(), self.memory)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        return ",".join(map(str, descriptors))

    def start(self) -> None:
        """Count the requests of this worker, and start the thread that responds to scrapes."""
        if not metrics.begin():
            log.warning("METRICS_PORT: there are too many workers; this one counts nothing")
        thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="metrics", daemon=True)
        try:
            thread.start()
            self._thread = thread
        except RuntimeError as error:  # the limit of processes is reached; other workers respond
            log.warning("METRICS_PORT: this worker does not respond to scrapes: %s", error)

    def end(self) -> None:
        """Accept no more connections in this worker, and wait for the responses to those that it has accepted."""
        with suppress(RuntimeError):  # the thread has ended
            self._wake()
        if self._thread:
            self._thread.join(_LAST_TIMEOUT)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle, sock=self.listener, limit=_HEAD_SIZE, backlog=_MOST_CLIENTS)
        ending = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, ending.set)
        async with server:
            while not ending.is_set():
                _update()
                with suppress(TimeoutError):
                    await asyncio.wait_for(ending.wait(), _PAUSE)
        await asyncio.sleep(_ACCEPT_TIME)
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients[writer] = None
        if len(self._clients) > _MOST_CLIENTS:
            next(iter(self._clients)).transport.abort()
        try:
            async with asyncio.timeout(_TIMEOUT):
                writer.write(self._response(await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError):  # the client is gone, or slow, or sends something else
            writer.transport.abort()
        finally:
            del self._clients[writer]

    def _response(self, request: bytes) -> bytes:
        method, _, rest = request.decode("latin-1").partition(" ")
        target, _, version = rest.partition("\r\n")[0].rpartition(" ")
        head, blank_line, body = self._response_to(method, target, version).partition(b"\r\n\r\n")
        return head + blank_line + (body if method != "HEAD" else b"")

    def _response_to(self, method: str, target: str, version: str) -> bytes:
        if not version.startswith("HTTP/1."):
            return _problem(HTTPStatus.BAD_REQUEST)
        if target.partition("?")[0] != "/metrics":
            return _problem(HTTPStatus.NOT_FOUND)
        if method not in {"GET", "HEAD"}:
            return _problem(HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")
        _update()
        body = generate_latest(self._registry)
        lines = ["HTTP/1.1 200 OK", f"Content-Type: {_CONTENT_TYPE}", f"Content-Length: {len(body)}"]
        lines += ["Cache-Control: no-store", "Connection: close", "", ""]
        return "\r\n".join(lines).encode() + body


def _update() -> None:
    state = database.pool_state()
    metrics.set_gauges(size=state.size, available=state.available, waiting=state.waiting, outage=state.outage)


def _problem(status: int, **headers: str) -> bytes:
    _, detail = problems.kind_of(status)
    return problem_bytes(status, detail, headers)


def open_port(host: str, port: int, inherited: str) -> MetricsPort:
    """Open the port, or use the one that this process has inherited from the service that it replaces.

    Raises:
        OSError: the port cannot be opened, or there is no memory for the figures.

    """
    numbers = re.fullmatch(r"(\d+),(\d+)", inherited)
    listener = _inherited_listener(int(numbers[1]), port) if numbers else None
    if not listener:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=dual)
    listener.settimeout(0)
    return MetricsPort(listener, metrics.open(int(numbers[2]) if numbers else -1))


def _inherited_listener(descriptor: int, port: int) -> socket.socket | None:
    """Return an inherited socket if it listens on this port."""
    try:
        found = socket.socket(fileno=descriptor)
    except OSError:
        return None
    if found.getsockname()[1] == port:
        return found
    found.close()
    return None
