"""Clients that send slowly or stop within a request: other clients do not wait for them, and they get a 408."""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.fixtures import Figure, Start
from tests.support.processes import wait_until
from tests.support.service import Service, workers

POST = b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMALL = b'{"title": "x"}'
BEGINNINGS = {  # of a request; the bytes after it are sent one by one
    "head": b"GET /api/tasks HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "request line": b"GET /api/tasks?q=",
    "body": POST + b'Content-Length: 60000\r\n\r\n{"title": "',
    "body over the limit": POST + b'Content-Length: 900000\r\n\r\n{"title": "',
    "body whose length has zeros in front": POST + b'Content-Length: 0000000000000000000060000\r\n\r\n{"title": "',
    "body whose encoding has no space in front": POST + b'Transfer-Encoding:chunked\r\n\r\n1000\r\n{"title": "',
    "body whose encoding has a tab in front": POST + b'Transfer-Encoding:\tchunked\r\n\r\n1000\r\n{"title": "',
    "body whose encoding has a space behind": POST + b'Transfer-Encoding: chunked \r\n\r\n1000\r\n{"title": "',
    "body with two encodings": POST + b'Transfer-Encoding: gzip, chunked\r\n\r\n1000\r\n{"title": "',
    "body with an encoding that cannot be read": POST + b'Transfer-Encoding: gzip\r\n\r\n{"title": "',
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


@pytest.mark.parametrize(
    ("beginning", "status"),
    [
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n", b"501"),
        (CHUNKED + b"e\n", b"400"),
    ],
)
def test_a_body_that_cannot_be_read_is_rejected_before_it_has_arrived(
    beginning: bytes, status: bytes, service: Service
) -> None:
    with connect(service) as connection:
        connection.settimeout(15)  # less than the time limit of a request, which would end in a 408
        connection.sendall(beginning)
        assert connection.recv(65_536).split()[1] == status


def test_clients_that_send_long_extensions_of_chunks_occupy_little_memory(database_url: str, start: Start) -> None:
    service = start(DATABASE_URL=database_url, WEB_CONCURRENCY=1).wait()
    [worker] = workers(service)
    before = worker.memory_info().rss
    with ExitStack() as opened:
        connections = [opened.enter_context(connect(service)) for _ in range(100)]
        chunks = (b"1;" + b"x" * 7000 + b"\r\n \r\n") * 280  # 2 MiB
        for connection in connections:
            with suppress(OSError):  # it is closed once the thread gives up
                connection.sendall(CHUNKED + chunks)
        time.sleep(3)  # the worker reads what the kernel has received
        growth = worker.memory_info().rss - before
    assert service.client.get("/healthz").status_code == 200
    assert growth < 120 * 2**20  # with 2 MiB for each client, it would be 200 MiB


def test_a_keep_alive_of_0_closes_the_connection_after_each_response(database_url: str, start: Start) -> None:
    service = start(command=[sys.executable, "wsgi.py", "--keep-alive=0"], DATABASE_URL=database_url).wait()
    for pause in (0, 1.5):  # a client may connect some time before its request
        with connect(service) as connection:
            time.sleep(pause)
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            response = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert b" 200 OK" in response
        assert b"Connection: close" in response


# A list of them is larger than the buffers of the kernel.
MANY_TASKS = """
    INSERT INTO tasks (user_id, title, description)
    SELECT 'local', 'one of many', repeat('x', 2000) FROM generate_series(1, 10000)
"""


def reader(service: Service) -> socket.socket:
    """Ask for a large list, over a connection that takes little at a time."""
    connection = socket.socket()
    connection.settimeout(60)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", service.port))
    connection.sendall(b"GET /api/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return connection


def test_sixteen_clients_that_read_slowly_hold_up_nobody(
    database_url: str, db: psycopg.Connection[TupleRow], start: Start
) -> None:
    service = start(DATABASE_URL=database_url, WEB_CONCURRENCY=1).wait()
    db.execute(MANY_TASKS)
    with ExitStack() as opened, httpx.Client(base_url=service.url, timeout=60) as client:
        readers = [opened.enter_context(reader(service)) for _ in range(16)]
        waits = []
        for _ in range(10):
            began = time.monotonic()
            assert client.get("/api/tasks?limit=1").status_code == 200
            for connection in readers:
                assert connection.recv(1)
            waits.append(time.monotonic() - began)
        assert sum(waits) < 10  # each of them would keep a thread for longer
    assert service.stop() == 0


def test_a_client_that_reads_slowly_gets_everything_and_can_go_on(
    database_url: str, db: psycopg.Connection[TupleRow], start: Start
) -> None:
    service = start(DATABASE_URL=database_url).wait()
    db.execute(MANY_TASKS)
    with reader(service) as connection, connection.makefile("rb") as stream:
        time.sleep(0.5)  # longer than a thread waits
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        for kind in (list, dict):
            head = b"".join(iter(stream.readline, b"\r\n"))
            assert head.startswith(b"HTTP/1.1 200 ")
            [length] = re.findall(rb"Content-Length: (\d+)", head)
            assert isinstance(json.loads(stream.read(int(length))), kind)


@pytest.mark.long
def test_a_client_that_stops_reading_is_disconnected(
    database_url: str, db: psycopg.Connection[TupleRow], start: Start
) -> None:
    service = start(DATABASE_URL=database_url, WEB_CONCURRENCY=1).wait()
    db.execute(MANY_TASKS)
    [worker] = workers(service)

    def clients() -> int:
        return len(
            [found for found in worker.net_connections("tcp4") if found.raddr and found.laddr[1] == service.port]
        )

    others = clients()
    with reader(service):
        wait_until(lambda: clients() == others + 1)
        wait_until(lambda: clients() == others, timeout=30)
