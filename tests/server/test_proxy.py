"""The service behind nginx with .deploy/nginx.conf: TLS, slow clients, nginx's own errors, unchanged responses."""

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
from tests.support.issuer import SigningKey, bearer, running_issuer
from tests.support.load import Load, assert_acknowledged_once
from tests.support.nginx import start_nginx, tls
from tests.support.optional_tools import program
from tests.support.pages import SEED, pages
from tests.support.problems import assert_problem
from tests.support.processes import free_port, wait_until
from tests.support.service import Service, workers

Database = psycopg.Connection[TupleRow]
JSON = {"Content-Type": "application/json"}
GET = b"GET /api/tasks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TASK_1 = "INSERT INTO tasks (id, user_id, title, version) OVERRIDING SYSTEM VALUE VALUES (1, 'local', 'é%/+ x', 7)"


@pytest.fixture
def nginx(start: Start, tmp_path: Path, service: Service) -> Service:
    """Run nginx in front of the session's service."""
    return start_nginx(start, tmp_path, service)


def send(nginx: Service, request: bytes) -> ssl.SSLSocket:
    """Send bytes over a new connection, which buffers little of a response that is not read."""
    plain = socket.create_connection(("127.0.0.1", nginx.port), timeout=60)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    connection = tls(nginx).wrap_socket(plain, server_hostname="127.0.0.1")
    connection.sendall(request)
    return connection


def response_head(connection: ssl.SSLSocket) -> HTTPResponse:
    """Return the next response, after reading its head."""
    response = HTTPResponse(connection)
    response.begin()
    return response


def test_the_calls_and_their_request_headers_work(nginx: Service, db: Database) -> None:
    client = nginx.client
    sent = {"Idempotency-Key": "once", "X-Request-ID": "mine", "X-Forwarded-Host": "evil.example"}
    created, again = (client.post("/api/tasks", json={"title": "é"}, headers=sent) for _ in range(2))
    task = created.headers["Location"]
    assert (task, again.content) == (f"/api/tasks/{created.json()['id']}", created.content)
    assert (created.status_code, created.headers["ETag"], created.headers["X-Request-ID"]) == (201, '"1"', "mine")
    assert client.patch(task, json={"completed": True}, headers={"If-Match": '"1"'}).headers["ETag"] == '"2"'
    assert client.post(f"{task}/toggle", headers={"If-Match": '"2"'}).headers["ETag"] == '"3"'
    assert client.get("/api/tasks").json() == [client.get(task).json()]
    assert [client.delete(task, headers=given).status_code for given in ({"If-Match": '"2"'}, {})] == [412, 200]
    assert client.get("/docs/", headers=sent).headers["Location"] == "/docs"


def test_only_the_public_name_is_served_and_only_its_pages_change_tasks(
    start: Start, tmp_path: Path, database_url: str, db: Database
) -> None:
    [name] = re.findall(r"server_name (.*);", (ROOT / ".deploy" / "nginx.conf").read_text(encoding="utf-8"))
    service = start(DATABASE_URL=database_url, TRUSTED_HOSTS=name).wait()
    nginx = start_nginx(start, tmp_path, service)
    host = f"{name}:{nginx.port}"

    def create(**headers: str) -> httpx.Response:
        sent = {"Host": host} | {header.replace("_", "-"): value for header, value in headers.items()}
        return nginx.client.post("/api/tasks", json={"title": "x" * 200}, headers=sent)

    for _ in range(3):  # on connections that stay open
        created = [create(), create(Origin=f"https://{host}"), create(Sec_Fetch_Site="same-origin", Origin="null")]
        assert [response.status_code for response in created] == [201] * 3
        for refused in (create(Origin=f"https://{name}"), create(Origin="null"), create(Sec_Fetch_Site="cross-site")):
            assert_problem(refused, 403, "cross_origin_refused")
        for other in ("evil.example", f"{name}.evil.example", "todo_api"):
            assert_problem(create(Host=other, X_Forwarded_Host=name), 421, "misdirected_request")
    assert len(nginx.client.get("/api/tasks").json()) == 9
    assert "502" not in nginx.log()


def test_responses_are_the_same_as_without_nginx(nginx: Service, service: Service, db: Database) -> None:
    db.execute(TASK_1)
    for call in product(("GET", "HEAD", "PUT", "PATCH"), ("", "?limit=1&q=%C3%A9%25%2F%2B+", "/1", "/%2e%2e//2")):
        assert response_of_the_service(nginx.client, *call) == response_of_the_service(service.client, *call)


def response_of_the_service(client: httpx.Client, method: str, path: str) -> tuple[int, bytes, dict[str, str]]:
    """Make a call and return its status, its body, and the headers that the service sets."""
    sent = {"X-Request-ID": "mine", "X-Forwarded-Proto": "http", "If-None-Match": '"7"', "Range": "bytes=5-9", **JSON}
    response = client.request(method, f"/api/tasks{path}", headers=sent)
    ours = {name: response.headers[name] for name in response.headers if name not in {"connection", "date", "server"}}
    return response.status_code, response.content, ours


def test_long_lists_are_compressed_and_the_longest_task_keeps_its_etag(nginx: Service, db: Database) -> None:
    longest = {"title": "\x01" * 200, "description": "\x01" * 2000}
    task = nginx.client.post("/api/tasks", json=longest).headers["Location"]
    tag = {"If-Match": nginx.client.get(task).headers["ETag"]}  # of a 200, since nginx does not compress a 201
    assert nginx.client.post(f"{task}/toggle", headers=tag).status_code == 200
    db.execute(SEED, {"count": 200})
    full = nginx.client.get("/api/tasks")
    assert full.headers["Content-Encoding"] == "gzip"
    assert nginx.client.get("/api/tasks", headers={"If-None-Match": full.headers["ETag"]}).status_code == 304
    assert [task for page in pages(nginx.client, limit=150) for task in page] == full.json()


def test_50_clients_that_send_a_byte_at_a_time_do_not_delay_others(nginx: Service, db: Database) -> None:
    body = b'{"title": "slow"}'
    slow = [send(nginx, POST + b"Content-Length: %d\r\n\r\n" % len(body)) for _ in range(50)]
    for byte in body:
        assert nginx.client.post("/api/tasks", json={"title": "quick"}).status_code == 201
        for connection in slow:
            connection.sendall(bytes([byte]))
    assert [response_head(connection).status for connection in slow] == [201] * 50


def test_50_clients_that_read_a_list_of_10_000_slowly_do_not_delay_others(nginx: Service, db: Database) -> None:
    db.execute(SEED, {"count": 10_000})
    db.execute("UPDATE tasks SET description = repeat('x', 500)")  # 7 MB, of which the kernel buffers up to 4 MB
    expected = nginx.client.get("/api/tasks").content
    slow = [response_head(send(nginx, GET)) for _ in range(50)]
    read = [b""] * len(slow)
    for _ in range(10):
        assert nginx.client.get("/readyz").status_code == 200
        read = [begun + response.read(100) for begun, response in zip(read, slow, strict=True)]
    assert {begun + response.read() for begun, response in zip(read[:5], slow[:5], strict=True)} == {expected}


def test_a_body_over_the_limit_gets_the_same_problem_as_without_nginx(nginx: Service, service: Service) -> None:
    for client, size in product((nginx.client, service.client), (65_537, 3_000_000)):
        for body in (b" " * size, iter([b" " * size])):  # the second is sent in chunks
            response = client.post("/api/tasks", content=body, headers=JSON)
            assert assert_problem(response, 413, "content_too_large")["title"] == "Content Too Large"
    assert nginx.client.post("/api/tasks", content=b'{"title": "x"}'.ljust(65_536), headers=JSON).status_code == 201


def test_requests_without_a_valid_token_and_with_a_body_disturb_no_others(
    start: Start, tmp_path: Path, database_url: str
) -> None:
    key = SigningKey()
    with running_issuer(key) as issuer:
        nginx = start_nginx(start, tmp_path, start(DATABASE_URL=database_url, **issuer.settings()).wait())
        valid = bearer(key.token())
        wait_until(lambda: nginx.client.get("/api/tasks?limit=1", headers=valid).status_code == 200)
        for given in [{}, bearer("x"), {"Authorization": "Basic x"}] * 5:
            refused = nginx.client.post("/api/tasks", json={"title": "x" * 60_000}, headers=given)
            assert refused.status_code == (400 if "Basic x" in given.values() else 401)
            assert refused.headers["Vary"] == "Authorization"
            assert nginx.client.get("/api/tasks?limit=1", headers=valid).status_code == 200


def test_a_request_that_nginx_rejects_gets_a_problem(nginx: Service) -> None:
    for request, status, kind in (
        (b"GARBAGE\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 9000 + b"\r\n\r\n", 400, "malformed_request"),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method_not_allowed"),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501, "not_implemented"),
        (b"GET /problem HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (POST + b"Content-Length: 65537\r\n\r\n{", 413, "content_too_large"),  # the client is still sending
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri_too_long"),
    ):
        raw = response_head(send(nginx, request))
        assert_problem(httpx.Response(raw.status, headers=raw.getheaders(), content=raw.read()), status, kind)
    assert_problem(httpx.get(nginx.url.replace("https", "http")), 400, "malformed_request")


@pytest.mark.parametrize("q", ["\U0001f95b" * 250, "[" * 250, '<">\\' * 50], ids=["milk", "brackets", "quotes"])
def test_the_longest_q_can_be_paged_through(nginx: Service, db: Database, q: str) -> None:
    for _ in range(3):
        assert nginx.client.post("/api/tasks", json={"title": "x", "description": q}).status_code == 201
    assert [len(page) for page in pages(nginx.client, q=q, limit=1)] == [1, 1, 1]


APACHE = """
ServerName x
ServerRoot {folder}
PidFile pid
Listen 127.0.0.1:{port}
{modules}
ErrorLog error
SetOutputFilter DEFLATE
ProxyPass / http://127.0.0.1:{behind}/
"""


@pytest.fixture
def apache(start: Start, tmp_path: Path, service: Service) -> Service:
    """Run an Apache in front of the session's service. It compresses every response."""
    names = ["mpm_event", "proxy", "proxy_http", "filter", "deflate", "authz_core"]
    modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in names)
    port = free_port()
    config = APACHE.format(folder=tmp_path, port=port, modules=modules, behind=service.port)
    (tmp_path / "apache.conf").write_text(config, encoding="utf-8")
    return start(command=[program("apache2"), "-f", str(tmp_path / "apache.conf"), "-DFOREGROUND"], PORT=port).wait()


def test_the_etags_that_apache_makes_for_compressed_responses_work(apache: Service, db: Database) -> None:
    client = apache.client
    task = client.post("/api/tasks", json={"title": "milk" * 50}).headers["Location"]
    response = client.get(task)
    assert (response.headers["Content-Encoding"], response.headers["ETag"]) == ("gzip", '"1-gzip"')
    assert client.get(task, headers={"If-None-Match": '"1-gzip"'}).status_code == 304
    assert client.post(f"{task}/toggle", headers={"If-Match": '"1-gzip"'}).status_code == 200
    assert client.delete(task, headers={"If-Match": '"1-gzip"'}).status_code == 412
    tasks = client.get("/api/tasks")
    assert tasks.headers["ETag"].endswith('-gzip"')
    assert client.get("/api/tasks", headers={"If-None-Match": tasks.headers["ETag"]}).status_code == 304


# As the README says, but not for the path that shows whether nginx and the service are ready.
PASSWORDS = """
    map $uri $realm { default tasks; /readyz off; }
    auth_basic $realm; auth_basic_user_file todo_api.users;
"""


def test_without_tokens_nginx_asks_for_a_password(start: Start, tmp_path: Path, database_url: str) -> None:
    made = subprocess.run([program("openssl"), "passwd", "-6", "milk"], capture_output=True, text=True, check=True)
    (tmp_path / "todo_api.users").write_text(f"alice:{made.stdout}", encoding="utf-8")
    nginx = start_nginx(start, tmp_path, start(DATABASE_URL=database_url).wait(), more=PASSWORDS)
    assert nginx.client.get("/api/tasks", auth=("alice", "milk")).status_code == 200
    for password in ("", "oat milk"):
        refused = nginx.client.post("/api/tasks", json={"title": "Buy milk"}, auth=("alice", password))
        assert refused.headers["WWW-Authenticate"] == 'Basic realm="tasks"'
        assert_problem(refused, 401, "authentication_required")


def test_nginx_returns_a_problem_if_the_service_is_suspended_or_stopped(
    start: Start, tmp_path: Path, database_url: str
) -> None:
    service = start(DATABASE_URL=database_url).wait()
    nginx = start_nginx(start, tmp_path, service, more="proxy_read_timeout 3s;")
    [worker] = workers(service)
    worker.suspend()
    assert_problem(nginx.client.get("/api/tasks"), 504, "gateway_timeout")
    worker.resume()
    assert service.stop() == 0
    assert_problem(nginx.client.get("/api/tasks"), 502, "bad_gateway")
    start(DATABASE_URL=database_url, PORT=service.port).wait()
    assert nginx.client.post("/api/tasks", json={"title": "first"}).status_code == 201


@pytest.mark.parametrize("call", ["POST  502", "PATCH /1 502", "POST /1/toggle 502", "GET  200"])
def test_nginx_retries_only_safe_requests_if_a_worker_dies(
    start: Start, tmp_path: Path, database_url: str, db: Database, call: str
) -> None:
    method, path, status = call.split(" ")
    db.execute(TASK_1)
    service = start(DATABASE_URL=database_url).wait()
    nginx = start_nginx(start, tmp_path, service)  # it retries only on a connection that it has kept open
    [worker] = workers(service)
    worker.suspend()
    with ThreadPoolExecutor(1) as thread:
        response = thread.submit(nginx.client.request, method, f"/api/tasks{path}", json={"title": "x"})
        wait_until(lambda: has_unread_data(service.port))
        worker.kill()
        assert response.result().status_code == int(status)
    wait_until(service.answers)
    assert [(task["id"], task["version"]) for task in service.client.get("/api/tasks").json()] == [(1, 7)]


def has_unread_data(port: int) -> bool:
    """Return whether a connection to a port has data that no process has read."""
    established = rf":{port:04X} \S+ 01 \w+:(?!0{{8}})"  # the local port, the remote address, the state, the two queues
    return bool(re.search(established, Path("/proc/net/tcp").read_text(encoding="ascii")))


def test_no_request_fails_during_a_reload_of_the_service(
    start: Start, tmp_path: Path, database_url: str, db: Database, conninfo: str
) -> None:
    service = start(DATABASE_URL=database_url, WEB_CONCURRENCY=2).wait()
    wait_until(lambda: len(workers(service)) == 2)
    before = {worker.pid for worker in workers(service)}
    with Load(start_nginx(start, tmp_path, service), 10) as load:
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not before & {worker.pid for worker in workers(service)})
    assert set(load.statuses()) == {201}
    assert_acknowledged_once(load.calls, conninfo)
