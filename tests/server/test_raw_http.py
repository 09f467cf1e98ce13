"""Requests that no HTTP library would send, over a raw socket: their responses are problems, too."""

import json
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, BinaryIO

import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.fixtures import Start
from tests.support.processes import wait_until
from tests.support.service import Service

POST = b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG_FIELD = b"A: " + b"a" * 8000 + b"\r\n"
CLOSE = b"GET /api/tasks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


def send(service: Service, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, close the sending side, and return the status, headers and body of the first response."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that sendall() waits for the server
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        response = b"".join(iter(lambda: connection.recv(65_536), b""))
    head, _, body = response.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body[: int(headers["Content-Length"])]


def problem(service: Service, request: bytes) -> dict[str, Any]:
    """Send bytes, check the headers that every response has, and return the problem."""
    status, headers, body = send(service, request)
    members: dict[str, Any] = json.loads(body)
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["X-Request-ID"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert members["status"] == status
    return members


@pytest.mark.parametrize(
    "rest",
    [
        b'Content-Length: 100\r\n\r\n{"title": "x"}',
        b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"tit',
        b'Transfer-Encoding: chunked\r\n\r\ne\r\n{"title": "x"}\r\n',
        b'Transfer-Encoding: chunked\r\n\r\nzz\r\n{"title": "x"}\r\n0\r\n\r\n',
        b'Transfer-Encoding: chunked\r\n\r\n2\r\n{"title": "x"}\r\n0\r\n\r\n',
        b'Transfer-Encoding: chunked\r\n\r\n-1\r\n{"title": "x"}\r\n0\r\n\r\n',
        b'Transfer-Encoding: chunked\r\n\r\ne\r\n{"title": "x"}\r\n0\r\nbad trailer\r\n\r\n',
    ],
)
def test_an_incomplete_or_malformed_body_is_rejected_and_stores_nothing(
    service: Service, db: psycopg.Connection[TupleRow], rest: bytes
) -> None:
    assert problem(service, POST + rest)["type"] == "malformed_request"
    assert db.execute("SELECT 1 FROM tasks").fetchall() == []


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/toggle")])
def test_a_malformed_body_is_rejected_by_calls_that_need_none(
    service: Service, db: psycopg.Connection[TupleRow], method: str, path: str
) -> None:
    task = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    head = f"{method} /api/tasks/{task['id']}{path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert problem(service, head.encode() + b"zz\r\n")["type"] == "malformed_request"
    assert db.execute("SELECT version FROM tasks").fetchall() == [(1,)]


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"deflate,chunked"])
def test_a_compressed_body_is_rejected(service: Service, coding: bytes) -> None:
    request = POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n" + chunked(SMALL)
    assert problem(service, request)["type"] == "not_implemented"


def test_a_body_of_many_chunks_is_read(service: Service) -> None:
    pieces = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in b'{"title": "x"}')
    status, headers, _ = send(service, POST + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")
    assert (status, headers["Content-Type"]) == (201, "application/json")


@pytest.mark.parametrize(
    ("request_bytes", "status", "kind"),
    [
        (b"GARBAGE\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400, "malformed_request"),
        (b"GET /api/tasks/\xd9\xa1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nNo Colon\r\n\r\n", 400, "malformed_request"),
        (POST + b"Content-Length: -1\r\n\r\n", 400, "malformed_request"),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, "malformed_request"),
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: magic\r\n\r\n", 417, "expectation_failed"),
        (POST + b"Transfer-Encoding: magic\r\n\r\n", 501, "not_implemented"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri_too_long"),
        (b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 9000 + b"\r\n\r\n", 431, "request_header_fields_too_large"),
        (b"GET / HTTP/1.1\r\n" + 5 * LONG_FIELD + b"Host: x\r\n\r\n", 431, "request_header_fields_too_large"),
    ],
)
def test_a_request_that_gunicorn_cannot_parse_gets_a_problem(
    service: Service, request_bytes: bytes, status: int, kind: str
) -> None:
    members = problem(service, request_bytes)
    assert (members["status"], members["type"]) == (status, kind)


@pytest.mark.parametrize(
    ("request_bytes", "detail"),
    [
        (
            b"patch /api/tasks/1 HTTP/1.1\r\nHost: x\r\n\r\n",
            "The method must be 3 to 20 letters in upper case: 'patch'",
        ),
        (b"GET /caf\xc3\xa9?q=secret HTTP/1.1\r\nHost: x\r\n\r\n", r"percent-encoded in a URL: 'GET /caf\xc3\xa9'"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nBad Name: secret\r\n\r\n", "Invalid header name: 'Bad'"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: secret\x07\r\n\r\n", "Invalid or repeated header: 'A'"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization secret\r\n\r\n", "repeated header: 'Authorization'"),
        (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", "The HTTP version must be 1.0 or 1.1"),
        (b"GET / HTTP/1.1\r\nAccept: */*\r\n\r\n", "HTTP/1.1 requires a Host header"),
        (b"\x16\x03\x01\x02\x00\x01\x00", r"in a URL: '\x16\x03\x01\x02\x00\x01\x00'"),  # TLS
        (b"\x1b[31m" + b"x" * 500 + b"\r\n\r\n", "'\\x1b[31m" + "x" * 55 + "'"),
    ],
)
def test_the_problem_and_the_log_say_what_is_unreadable(service: Service, request_bytes: bytes, detail: str) -> None:
    seen = len(service.log())
    found = problem(service, request_bytes)["detail"]
    assert detail in found
    assert found.isprintable()
    assert len(found) < 250
    assert "secret" not in found + service.log()[seen:]


def test_an_unknown_version_of_http_is_not_quoted(service: Service) -> None:
    # gunicorn has it as a tuple, such as (9, 9).
    assert problem(service, b"GET / HTTP/9.9\r\nHost: x\r\n\r\n")["detail"] == "The HTTP version must be 1.0 or 1.1"


def test_http_1_0_needs_no_host(service: Service) -> None:
    assert send(service, b"GET /healthz HTTP/1.0\r\n\r\n")[0] == 200


@pytest.mark.parametrize("path", [b"//api/tasks", b"///", b"//docs"])
def test_a_path_that_begins_with_two_slashes_is_not_found(service: Service, path: bytes) -> None:
    assert problem(service, b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)["type"] == "not_found"


def test_one_client_does_not_fill_the_log(database_url: str, start: Start) -> None:
    service = start(DATABASE_URL=database_url).wait()
    seen = len(service.log())
    many = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"\x07" * 810_000
    for request in [
        many,
        b"GET /" + b"%07" * 2700 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        *[b"\x07" * 8000 + b"\r\n"] * 500,
    ]:
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection, suppress(OSError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65_536):
                pass
    assert len(service.log()) - seen < 10_000


@pytest.mark.parametrize("expect", [b"Expect: 100-continue", b"Expect:100-Continue", b"EXPECT:\t100-continue "])
@pytest.mark.parametrize("framing", [b"Content-Length: 900000", b"Transfer-Encoding: chunked"])
def test_expect_100_continue_is_answered_before_the_body(service: Service, framing: bytes, expect: bytes) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(POST + expect + b"\r\n" + framing + b"\r\n\r\n")
        answer = connection.recv(65_536)
        if framing.startswith(b"Content"):
            assert answer.startswith(b"HTTP/1.1 413 ")
            return
        assert answer == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(chunked(SMALL))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 201 ")


def test_an_old_client_gets_no_100_continue(service: Service) -> None:
    request = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Expect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(request + b"Content-Length: 14\r\n\r\n")
        time.sleep(0.2)
        connection.sendall(SMALL)
        assert connection.recv(65_536).startswith((b"HTTP/1.0 201 ", b"HTTP/1.1 201 "))


@pytest.mark.parametrize(
    "path", [b"/api/tasks", b"/api/tasks/1", b"/docs", b"/docs/page.js", b"/healthz", b"/openapi.json"]
)
def test_the_response_to_options_has_allow_but_no_body_and_no_type(service: Service, path: bytes) -> None:
    status, headers, body = send(service, b"OPTIONS %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path)
    assert (status, body) == (200, b"")
    assert "OPTIONS" in headers["Allow"]
    assert "Content-Type" not in headers


@pytest.mark.parametrize("header", [b"SCRIPT_NAME: /api/tasks", b"SCRIPT-NAME: /api", b"PATH_INFO: /docs"])
def test_headers_do_not_change_the_routing(service: Service, header: bytes) -> None:
    status, headers, _ = send(service, CLOSE + header + b"\r\n\r\n")
    assert (status, headers["Content-Type"]) in {(200, "application/json"), (400, "application/problem+json")}


def test_the_host_header_does_not_change_the_location(service: Service) -> None:
    body = b'{"title": "x"}'
    request = POST.replace(b"Host: localhost", b"Host: 127.9.9.9:1") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert send(service, request)[1]["Location"].startswith("/api/tasks/")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET http://localhost/docs HTTP/1.1\r\nHost: evil.example", 200),
        (b"GET HTTP://LOCALHOST.:8000/docs?q=1 HTTP/1.1\r\nHost: evil.example", 200),
        (b"GET http://evil.example/docs HTTP/1.1\r\nHost: localhost", 421),
        (b"GET http://evil.example/docs HTTP/1.0", 421),
        (b"GET http://localhost@evil.example/docs HTTP/1.1\r\nHost: localhost", 421),
        (b"GET http://evil.example\\@localhost/docs HTTP/1.1\r\nHost: localhost", 421),
        (b"GET http:///docs HTTP/1.1\r\nHost: localhost", 421),
        (b"GET x?://docs HTTP/1.1\r\nHost: localhost", 421),
        (b"GET //localhost/docs HTTP/1.1\r\nHost: evil.example", 421),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost", 421),
        (b"OPTIONS * HTTP/1.1\r\nHost: evil.example", 421),
        (b"GET /docs HTTP/1.1\r\nHost: localhost\r\nHost: localhost", 400),
        (b"GET /docs HTTP/1.1\r\nHost: localhost\r\n evil.example", 400),
        (b"GET /docs HTTP/1.1\r\nHost : localhost", 400),
        (b"GET /docs HTTP/1.1\r\nHost: evil.example\r\nHTTP_HOST: localhost", 421),
        (b"GET /docs HTTP/1.1", 400),
        (b"GET http://localhost/docs HTTP/1.1", 400),
        (b"GET /healthz HTTP/1.1", 400),
        (b"GET /docs HTTP/1.0", 421),
        (b"GET /docs HTTP/1.9", 421),
        (b"GET /docs HTTP/1.0\r\nHost: localhost", 200),
        (b"GET /docs HTTP/1.1\r\nhOST:\tlocalhost ", 200),
    ],
)
def test_the_host_is_that_of_the_target_or_else_the_only_host_header(
    service: Service, head: bytes, status: int
) -> None:
    assert send(service, head + b"\r\nConnection: close\r\n\r\n")[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Origin: http://localhost\r\nOrigin: http://evil.example", 403),
        (b"Origin: http://evil.example\r\nOrigin: http://localhost", 403),
        (b"Origin: http://localhost\r\nOrigin: http://localhost", 403),
        (b"Sec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site", 403),
        (b"Sec-Fetch-Site: cross-site\r\nSec-Fetch-Site: none", 403),
        (b"sec-fetch-site:cross-site", 403),
        (b"ORIGIN: http://evil.example", 403),
        (b"Origin:", 403),
        (b"Origin: http://evil.example\r\nSec_Fetch_Site: none", 403),
        (b"Origin: http://evil.example\r\nX-HTTP-Method-Override: GET", 403),
        (b"Origin: http://localhost", 201),
        (b"SEC-FETCH-SITE: same-origin", 201),
    ],
)
def test_headers_that_browsers_do_not_send_hide_no_origin(service: Service, headers: bytes, status: int) -> None:
    assert send(service, POST + headers + b"\r\nContent-Length: 14\r\n\r\n" + SMALL)[0] == status


def test_the_origin_is_compared_with_the_host_of_the_target(service: Service) -> None:
    rest = b"Content-Length: 14\r\n\r\n" + SMALL
    for origin, status in ((b"http://127.0.0.1:1", 201), (b"http://localhost", 403)):
        request = POST.replace(b"/api", b"http://127.0.0.1:1/api") + b"Origin: " + origin + b"\r\n" + rest
        assert send(service, request)[0] == status


def test_a_client_that_may_not_use_the_proxy_protocol_gets_a_problem(database_url: str, start: Start) -> None:
    options = ["--worker-class", "gthread", "--proxy-protocol", "v1", "--proxy-allow-from", "10.0.0.1"]
    service = start(command=[sys.executable, "wsgi.py", *options], DATABASE_URL=database_url)
    wait_until(lambda: "serving http" in service.log())
    found = problem(service, b"PROXY TCP4 192.168.1.5 127.0.0.1 5 80\r\n" + CLOSE + b"\r\n")
    assert (found["type"], "PROXY" in found["detail"]) == ("malformed_request", True)


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        (b"/api/tasks", b"Content-Length: 900000\r\n\r\n" + b" " * 900_000),
        (b"/api/tasks/1/toggle", b"Content-Length: 900000\r\n\r\n" + b" " * 900_000),
        (b"/api/tasks", b"Transfer-Encoding: chunked\r\n\r\ndbba0\r\n" + b" " * 900_000 + b"\r\n0\r\n\r\n"),
    ],
)
def test_a_body_over_the_limit_is_413_on_every_call_and_closes_the_connection(
    service: Service, path: bytes, rest: bytes
) -> None:
    status, headers, _ = send(service, POST.replace(b"/api/tasks", path) + rest)
    assert (status, headers["Connection"]) == (413, "close")


def test_a_request_that_gunicorn_cannot_parse_is_logged_with_its_id(database_url: str, start: Start) -> None:
    service = start(DATABASE_URL=database_url).wait()  # its own, because a service logs only some of them in a minute
    _, headers, _ = send(service, b"NONSENSE\r\n\r\n")
    assert re.search(rf"400 .*NONSENSE.* {headers['X-Request-ID']}$", service.log(), re.MULTILINE)


SMALL = b'{"title": "x"}'
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


def chunked(body: bytes) -> bytes:
    """Return a chunked body of one chunk."""
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def test_a_chunked_request_keeps_its_connection_open(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        for _ in range(3):
            connection.sendall(POST + CHUNKED + chunked(SMALL))
            response = connection.recv(65_536)
            assert response.startswith(b"HTTP/1.1 201 ")
            assert b"Connection: keep-alive\r\n" in response


@pytest.mark.parametrize("limit", [1024, 65_536, 100_000])
@pytest.mark.parametrize(
    "target", [b"POST /nope", b"PUT /api/tasks", b"POST /api/tasks/999/toggle", b"DELETE /healthz"]
)
def test_a_response_announces_whether_its_connection_stays_open(
    limit: int, target: bytes, database_url: str, start: Start
) -> None:
    service = start(DATABASE_URL=database_url, MAX_BODY_BYTES=limit).wait()
    outcomes = set()
    for size in (0, 1, limit - 1, limit, limit + 1, 65_535, 65_536, 65_537, 131_072, 900_000):
        for framed in (b"Content-Length: %d\r\n\r\n" % size + b" " * size, CHUNKED + chunked(b" " * size)):
            if size or not framed.startswith(CHUNKED):
                request = target + b" HTTP/1.1\r\nHost: localhost\r\n" + framed
                outcomes.add((size > limit, connection_state(service, request)))
    assert outcomes == {(False, "kept"), (True, "closed")}


@pytest.mark.parametrize("refused", [b"Host: evil.example\r\n", b"Host: localhost\r\nOrigin: null\r\n"])
def test_a_refused_request_keeps_its_connection_open_unless_its_body_is_too_large(
    service: Service, refused: bytes
) -> None:
    outcomes = set()
    for size in (0, 1, 65_536, 65_537, 900_000):
        for framed in (b"Content-Length: %d\r\n\r\n" % size + b" " * size, CHUNKED + chunked(b" " * size)):
            if size or not framed.startswith(CHUNKED):
                request = b"POST /api/tasks HTTP/1.1\r\n" + refused + framed
                outcomes.add((size > 65_536, connection_state(service, request)))
    assert outcomes == {(False, "kept"), (True, "closed")}


def test_the_body_of_a_refused_request_is_not_taken_for_a_request(
    service: Service, db: psycopg.Connection[TupleRow]
) -> None:
    body = POST + b"Content-Length: 14\r\n\r\n" + SMALL
    refused = POST + b"Origin: null\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(refused * 2 + CLOSE + b"\r\n")
        with connection.makefile("rb") as responses:
            statuses = [head_of(responses)[9:12] for _ in range(3)]
            assert (statuses, responses.read()) == ([b"403", b"403", b"200"], b"")
    assert db.execute("SELECT 1 FROM tasks").fetchall() == []


def connection_state(service: Service, request: bytes) -> str:
    """Send a request, and a second one if the response keeps the connection. Return the state of the connection."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as responses:
            if b"Connection: close" in head_of(responses):
                return "closed" if not responses.read() else "open in spite of its response"
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            return "kept" if head_of(responses).startswith(b"HTTP/1.1 200 ") else "closed in spite of its response"


def head_of(responses: BinaryIO) -> bytes:
    """Read a response, and return its head, which is empty if the connection was closed."""
    head = b"".join(iter(lambda: responses.readline().removeprefix(b"\r\n"), b""))
    for length in re.findall(rb"Content-Length: (\d+)", head):
        responses.read(int(length))
    return head


def test_a_client_that_pipelines_requests_is_read_at_the_pace_of_its_responses(service: Service) -> None:
    requests = 1000 * b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sent = 0

    def send_without_end() -> None:
        nonlocal sent
        with suppress(OSError):  # the test has closed the connection
            while True:
                sent += connection.send(requests)

    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        sender = threading.Thread(target=send_without_end)
        sender.start()
        with connection.makefile("rb") as responses:
            for _ in range(500):
                head = b"".join(iter(responses.readline, b"\r\n"))
                assert head.startswith(b"HTTP/1.1 200 ")
                responses.read(int(re.findall(rb"Content-Length: (\d+)", head)[0]))
        assert sent < 15_000_000  # what the kernel keeps; 64 KiB for each response would be 33 MB
        connection.shutdown(socket.SHUT_RDWR)
    sender.join()
