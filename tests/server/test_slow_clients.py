"""Clients that send slowly or stop within a request: other clients do not wait for them, and they get a 408."""

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from tests.support.fixtures import Figure, Start
from tests.support.service import Service

POST = b"POST /api/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMALL = b'{"title": "x"}'
BEGINNINGS = {  # of a request; the bytes after it are sent one by one
    "head": b"GET /api/tasks HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    "request line": b"GET /api/tasks?q=",
    "body": POST + b'Content-Length: 60000\r\n\r\n{"title": "',
    "body over the limit": POST + b'Content-Length: 900000\r\n\r\n{"title": "',
    "chunk": CHUNKED + b'1000\r\n{"title": "',
    "chunk over the limit": CHUNKED + b'100000\r\n{"title": "',
    "size of a chunk": CHUNKED + b"0",
    "trailer": CHUNKED + b"e\r\n" + SMALL + b"\r\n0\r\nX-Slow: ",
    "body after Expect": POST + b"Expect: 100-continue\r\nContent-Length: 60000\r\n\r\n",
    "second request": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /api/tasks HTTP/1.1\r\nX-Slow: ",
}


def connect(service: Service) -> socket.socket:
    """Connect to a service."""
    return socket.create_connection(("127.0.0.1", service.port), timeout=60)


@contextmanager
def slow(service: Service, beginning: bytes, clients: int = 16) -> Iterator[None]:
    """Let clients send a beginning, then a byte every 0.1 s. A client whose connection is closed connects again."""
    done = threading.Event()

    def drip() -> None:
        with ExitStack() as opened:
            connections = [opened.enter_context(connect(service)) for _ in range(clients)]
            for connection in connections:
                connection.sendall(beginning)
            while not done.wait(0.1):
                for number, connection in enumerate(connections):
                    try:
                        connection.sendall(b"0")
                    except OSError:
                        with suppress(OSError):  # the service may have stopped
                            connections[number] = opened.enter_context(connect(service))
                            connections[number].sendall(beginning)

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        time.sleep(0.5)  # until all clients send
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.long
def test_a_request_that_does_not_end_is_answered_with_408(service: Service) -> None:
    for beginning in (BEGINNINGS["head"], BEGINNINGS["chunk"]):
        with connect(service) as connection:
            connection.sendall(beginning)
            answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"application/problem+json" in answer


def test_a_stop_does_not_wait_for_a_request_that_does_not_end(database_url: str, start: Start) -> None:
    command = [sys.executable, "wsgi.py", "--graceful-timeout", "90"]
    service = start(command=command, DATABASE_URL=database_url).wait()
    with slow(service, BEGINNINGS["head"], clients=4):
        service.process.terminate()
        assert service.process.wait(timeout=45) == 0  # requests in progress would have 90 s


@pytest.mark.parametrize("pieces", [1, 7, 8192])
def test_a_request_can_arrive_in_pieces_of_any_size(pieces: int, service: Service) -> None:
    requests = POST + b"Content-Length: 14\r\n\r\n" + SMALL + CHUNKED + b"e\r\n" + SMALL + b"\r\n0\r\nX-T: 1\r\n\r\n"
    requests += b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connect(service) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(requests), pieces):
            connection.sendall(requests[start : start + pieces])
        answers = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"201", b"201", b"200"]


@pytest.mark.parametrize("part", BEGINNINGS)
def test_sixteen_clients_that_send_a_byte_at_a_time_do_not_delay_others(
    part: str, database_url: str, start: Start, figure: Figure
) -> None:
    service = start(DATABASE_URL=database_url, WEB_CONCURRENCY=1).wait()
    with slow(service, BEGINNINGS[part]), httpx.Client(base_url=service.url, timeout=60) as client:
        waits = []
        for _ in range(10):
            began = time.monotonic()
            assert client.get("/api/tasks?limit=1").status_code == 200
            assert client.post("/api/tasks", json={"title": "quick"}).status_code == 201
            waits.append(time.monotonic() - began)
    figure(f"slowest of 10 reads with a create, beside 16 clients that send their {part} slowly", f"{max(waits):.2f} s")
    assert max(waits) < 3
