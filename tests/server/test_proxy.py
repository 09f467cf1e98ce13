"""Behind nginx with .deploy/nginx.conf: TLS, slow clients, nginx's own errors, and what passes unharmed."""

import re
import signal
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from itertools import product
from pathlib import Path

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.environment import ROOT
from tests.support.fixtures import Start
from tests.support.load import Load, assert_acknowledged_once
from tests.support.optional_tools import program
from tests.support.pages import SEED, pages
from tests.support.problems import assert_problem
from tests.support.processes import free_port, wait_until
from tests.support.service import Service, workers

Database = psycopg.Connection[TupleRow]
JSON = {"Content-Type": "application/json"}
GET = b"GET /api/tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
POST = b"POST /api/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
TASK_1 = "INSERT INTO tasks (id, user_id, title, version) OVERRIDING SYSTEM VALUE VALUES (1, 'local', 'é%/+ x', 7)"
SELF_SIGNED = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x -addext"
# What a distribution's nginx.conf puts around the file, here in the test's folder, which only its owner may enter.
AROUND = """user root; pid pid; events {{}}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    {more} {file}
}}"""


def front(start: Start, folder: Path, behind: Service, more: str = "") -> Service:
    """Start nginx with .deploy/nginx.conf and ``more`` configuration in front of a service."""
    certificate, key, port = folder / "certificate", folder / "key", free_port()
    file = (ROOT / ".deploy" / "nginx.conf").read_text(encoding="utf-8")
    for theirs, ours in (
        ("/etc/ssl/certs/tasks.example.com.pem", certificate.name),
        ("/etc/ssl/private/tasks.example.com.key", key.name),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl sndbuf=32k"),  # the kernel's part, as small as on a slow way
        ("127.0.0.1:8000", f"127.0.0.1:{behind.port}"),
    ):
        assert file.count(theirs) == 1, theirs
        file = file.replace(theirs, ours)
    (folder / "nginx.conf").write_text(AROUND.format(more=more, file=file), encoding="utf-8")
    made = [*SELF_SIGNED.split(), "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([program("openssl"), *made], check=True, capture_output=True)
    command = [program("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
    nginx = start(command=command, PORT=port)
    nginx.url = f"https://127.0.0.1:{port}"
    nginx.client = httpx.Client(base_url=nginx.url, timeout=20, verify=tls(nginx))
    return nginx.wait()


def tls(nginx: Service) -> ssl.SSLContext:
    """Trust the certificate that was made for it, and no other."""
    return ssl.create_default_context(cafile=nginx.log_file.with_name("certificate"))


@pytest.fixture
def nginx(start: Start, tmp_path: Path, service: Service) -> Service:
    """Run nginx in front of the session's service."""
    return front(start, tmp_path, service)


def send(nginx: Service, request: bytes) -> ssl.SSLSocket:
    """Send bytes over a connection of their own, which takes little of an answer that is not read."""
    plain = socket.create_connection(("127.0.0.1", nginx.port), timeout=20)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    connection = tls(nginx).wrap_socket(plain, server_hostname="127.0.0.1")
    connection.sendall(request)
    return connection


def answer_to(connection: ssl.SSLSocket) -> HTTPResponse:
    """Read the head of an answer."""
    answer = HTTPResponse(connection)
    answer.begin()
    return answer


def test_the_calls_and_what_their_headers_ask_for_work(nginx: Service, db: Database) -> None:
    client = nginx.client
    sent = {"Idempotency-Key": "once", "X-Request-ID": "mine", "Host": "evil.example", "X-Forwarded-Host": "evil"}
    created, again = (client.post("/api/tasks", json={"title": "é"}, headers=sent) for _ in range(2))
    task = created.headers["Location"]
    assert (task, again.content) == (f"/api/tasks/{created.json()['id']}", created.content)
    assert (created.status_code, created.headers["ETag"], created.headers["X-Request-ID"]) == (201, '"1"', "mine")
    assert client.patch(task, json={"completed": True}, headers={"If-Match": '"1"'}).headers["ETag"] == '"2"'
    assert client.post(f"{task}/toggle", headers={"If-Match": '"2"'}).headers["ETag"] == '"3"'
    assert client.get("/api/tasks").json() == [client.get(task).json()]
    assert [client.delete(task, headers=given).status_code for given in ({"If-Match": '"2"'}, {})] == [412, 200]
    assert client.get("/docs/", headers=sent).headers["Location"] == "/docs"


def test_an_answer_is_as_it_is_without_nginx(nginx: Service, service: Service, db: Database) -> None:
    db.execute(TASK_1)
    for call in product(("GET", "HEAD", "PUT", "PATCH"), ("", "?limit=1&q=%C3%A9%25%2F%2B+", "/1", "/%2e%2e//2")):
        assert seen(nginx.client, *call) == seen(service.client, *call)


def seen(client: httpx.Client, method: str, path: str) -> tuple[int, bytes, dict[str, str]]:
    """Make a call and give what of its answer is the service's."""
    sent = {"X-Request-ID": "mine", "X-Forwarded-Proto": "http", "If-None-Match": '"7"', "Range": "bytes=5-9", **JSON}
    answer = client.request(method, f"/api/tasks{path}", headers=sent)
    ours = {name: answer.headers[name] for name in answer.headers if name not in {"connection", "date", "server"}}
    return answer.status_code, answer.content, ours


def test_long_lists_are_compressed_and_the_longest_task_keeps_its_tag(nginx: Service, db: Database) -> None:
    longest = {"title": "\x01" * 200, "description": "\x01" * 2000}
    task = nginx.client.post("/api/tasks", json=longest).headers["Location"]
    tag = {"If-Match": nginx.client.get(task).headers["ETag"]}  # nginx would compress a 200, but no 201
    assert nginx.client.post(f"{task}/toggle", headers=tag).status_code == 200
    db.execute(SEED, {"count": 200})
    full = nginx.client.get("/api/tasks")
    assert full.headers["Content-Encoding"] == "gzip"
    assert nginx.client.get("/api/tasks", headers={"If-None-Match": full.headers["ETag"]}).status_code == 304
    assert [task for page in pages(nginx.client, limit=150) for task in page] == full.json()


def test_50_clients_that_send_a_byte_at_a_time_hold_up_nobody(nginx: Service, db: Database) -> None:
    body = b'{"title": "slow"}'
    slow = [send(nginx, POST + b"Content-Length: %d\r\n\r\n" % len(body)) for _ in range(50)]
    for byte in body:
        assert nginx.client.post("/api/tasks", json={"title": "quick"}).status_code == 201
        for connection in slow:
            connection.sendall(bytes([byte]))
    assert [answer_to(connection).status for connection in slow] == [201] * 50


def test_50_clients_that_read_a_list_of_10_000_slowly_hold_up_nobody(nginx: Service, db: Database) -> None:
    db.execute(SEED, {"count": 10_000})
    db.execute("UPDATE tasks SET description = repeat('x', 500)")  # 7 MB: the kernel takes up to 4 from the service
    expected = nginx.client.get("/api/tasks").content
    slow = [answer_to(send(nginx, GET)) for _ in range(50)]
    read = [b""] * len(slow)
    for _ in range(10):
        assert nginx.client.get("/readyz").status_code == 200
        read = [begun + answer.read(100) for begun, answer in zip(read, slow, strict=True)]
    assert {begun + answer.read() for begun, answer in zip(read[:5], slow[:5], strict=True)} == {expected}


def test_a_body_over_the_limit_gets_the_problem_that_the_service_gives(nginx: Service, service: Service) -> None:
    for client, size in product((nginx.client, service.client), (65_537, 3_000_000)):
        for body in (b" " * size, iter([b" " * size])):  # the second is sent in chunks
            answer = client.post("/api/tasks", content=body, headers=JSON)
            assert assert_problem(answer, 413, "content_too_large")["title"] == "Content Too Large"
    assert nginx.client.post("/api/tasks", content=b'{"title": "x"}'.ljust(65_536), headers=JSON).status_code == 201


def test_what_nginx_refuses_is_a_problem_too(nginx: Service) -> None:
    for request, status, kind in (
        (b"GARBAGE\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 9000 + b"\r\n\r\n", 400, "malformed_request"),
        (b"GET /problem HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (POST + b"Content-Length: 65537\r\n\r\n{", 413, "content_too_large"),  # its client is still sending
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri_too_long"),
    ):
        answer = answer_to(send(nginx, request))
        assert_problem(httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read()), status, kind)
    assert_problem(httpx.get(nginx.url.replace("https", "http")), 400, "malformed_request")


def test_a_service_that_is_away_or_frozen_is_a_problem(start: Start, tmp_path: Path, database_url: str) -> None:
    service = start(DATABASE_URL=database_url).wait()
    nginx = front(start, tmp_path, service, "proxy_read_timeout 3s;")
    [worker] = workers(service)
    worker.suspend()
    assert_problem(nginx.client.get("/api/tasks"), 504, "gateway_timeout")
    worker.resume()
    assert service.stop() == 0
    assert_problem(nginx.client.get("/api/tasks"), 502, "bad_gateway")
    start(DATABASE_URL=database_url, PORT=service.port).wait()
    assert nginx.client.post("/api/tasks", json={"title": "first"}).status_code == 201


@pytest.mark.parametrize("call", ["POST  502", "PATCH /1 502", "POST /1/toggle 502", "GET  200"])
def test_only_what_may_be_done_twice_is_sent_again_where_a_worker_dies_over_it(
    start: Start, tmp_path: Path, database_url: str, db: Database, call: str
) -> None:
    method, path, status = call.split(" ")
    db.execute(TASK_1)
    service = start(DATABASE_URL=database_url).wait()
    nginx = front(start, tmp_path, service)  # it keeps a connection: only on such a one would it try again
    [worker] = workers(service)
    worker.suspend()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(nginx.client.request, method, f"/api/tasks{path}", json={"title": "x"})
        wait_until(lambda: unread(service.port))
        worker.kill()
        assert answer.result().status_code == int(status)
    wait_until(service.answers)
    assert [(task["id"], task["version"]) for task in service.client.get("/api/tasks").json()] == [(1, 7)]


def unread(port: int) -> bool:
    """Say whether a connection to a port has brought what nobody has read yet."""
    established = rf":{port:04X} \S+ 01 \w+:(?!0{{8}})"  # the local port, the other end, the state, the two queues
    return bool(re.search(established, Path("/proc/net/tcp").read_text(encoding="ascii")))


def test_a_reload_of_the_service_under_load_is_not_seen(
    start: Start, tmp_path: Path, database_url: str, db: Database, conninfo: str
) -> None:
    service = start(DATABASE_URL=database_url, WEB_CONCURRENCY=2).wait()
    wait_until(lambda: len(workers(service)) == 2)
    before = {worker.pid for worker in workers(service)}
    with Load(front(start, tmp_path, service), 10) as load:
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not before & {worker.pid for worker in workers(service)})
    assert set(load.statuses()) == {201}
    assert_acknowledged_once(load.calls, conninfo)
