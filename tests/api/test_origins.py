"""Which hosts, clients and origins are served: no web page reads or changes tasks through somebody's browser."""

from functools import cache
from typing import Any

import httpx
import psycopg
import pytest
from flask.testing import FlaskClient
from psycopg.rows import TupleRow
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client

from tests.support.environment import POOLER
from tests.support.fixtures import Create
from tests.support.problems import assert_problem
from todo_api import create_app
from todo_api.config import Settings

OWN_HOSTS = [
    *("localhost", "localhost:8000", "LOCALHOST", "localhost.", "localhost:", "localhost:0"),
    *("127.0.0.1", "127.0.0.1:8000", "127.255.0.9", "127.0.0.1.", "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]"),
    *("[::ffff:127.0.0.1]", "[::FFFF:7F00:1]:8000"),
]
OTHER_HOSTS = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost"),
    *("todo.localhost", ".localhost", "localhost..", "user@localhost", "localhost@evil.example", "localhost,localhost"),
    *("localhost evil.example", "localhost/", "localhost#", "localhost:80:80", "localhost:http", "localhost:100000"),
    *("", ":8000", "::1", "[::1", "[::1].", "[::1%25lo]", "[127.0.0.1]", "[localhost]", "127.1", "2130706433"),
    *("0x7f.0.0.1", "0177.0.0.1", "0.0.0.0", "[::]", "128.0.0.1", "192.168.1.5", "[::ffff:10.0.0.5]", "locälhost"),
]
PATHS = ["/", "/docs", "/docs/page.js", "/openapi.json", "/api/tasks", "/api/tasks/1", "/nope"]
HEALTH = ["/healthz", "/readyz"]
TODO = "todo.example.com"


@cache  # creating an application takes 40 ms
def application(database_url: str = "postgresql://todo@127.0.0.1:1/todo", **settings: Any) -> FlaskClient:
    """Return a client of an application with settings; by default its database cannot be reached."""
    return create_app(Settings(database_url=database_url, database_pooler=bool(POOLER), **settings)).test_client()


def status(client: FlaskClient, host: str, address: str = "127.0.0.1", path: str = "/docs") -> int:
    """Return the status of a GET for a host by a client with an address."""
    return client.get(path, headers={"Host": host}, environ_overrides={"REMOTE_ADDR": address}).status_code


# ---- Hosts


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_localhost_and_loopback_addresses_are_served(client: httpx.Client, host: str) -> None:
    assert client.get("/api/tasks", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_another_host_gets_a_421(client: httpx.Client, host: str) -> None:
    response = client.get("/api/tasks", headers={b"Host": host.encode()})
    assert_problem(response, 421, "misdirected_request")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PATCH", "DELETE", "BREW"])
def test_another_host_gets_a_421_for_every_url_and_method(client: httpx.Client, path: str, method: str) -> None:
    response = client.request(method, path, headers={"Host": "evil.example"})
    assert (response.status_code, response.headers["Content-Type"]) == (421, "application/problem+json")


@pytest.mark.parametrize("path", HEALTH)
def test_health_checks_may_name_any_host(client: httpx.Client, path: str) -> None:
    assert client.get(path, headers={"Host": "10.0.0.5:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [("X-Forwarded-Host", "{}"), ("X-Host", "{}"), ("Forwarded", "host={}"), ("X-Forwarded-Server", "{}")],
)
def test_headers_of_proxies_do_not_replace_the_host(client: httpx.Client, name: str, value: str) -> None:
    for host, forwarded, expected in (("evil.example", "localhost", 421), ("localhost", "evil.example", 200)):
        headers = {"Host": host, name: value.format(forwarded)}
        assert client.get("/docs", headers=headers).status_code == expected


def test_trusted_hosts_are_served() -> None:
    trusting = application(trusted_hosts=(TODO, "10.0.0.5", "fd00::5"))
    served = [
        TODO,
        f"{TODO}:8443",
        "TODO.Example.com.:443",
        "10.0.0.5:80",
        "[FD00:0::5]",
        "localhost",
        "127.0.0.1:8000",
    ]
    assert {host: status(trusting, host) for host in served} == dict.fromkeys(served, 200)
    others = [f"a.{TODO}", f"{TODO}.evil.example", f"x{TODO}", "example.com", "10.0.0.50", "[fd00::6]", f"user@{TODO}"]
    assert {host: status(trusting, host) for host in others} == dict.fromkeys(others, 421)


@pytest.mark.parametrize("settings", [{"allow_anonymous": True}, {"auth_jwks": "/nowhere/keys.json"}], ids=str)
def test_with_tokens_or_allow_anonymous_only_trusted_hosts_restrict_the_host(settings: dict[str, Any]) -> None:
    anonymous, trusting = application(**settings), application(**settings, trusted_hosts=(TODO,))
    for host in (TODO, "localhost"):
        assert [status(found, host, "192.168.1.7") for found in (anonymous, trusting)] == [200, 200]
    assert [status(found, "evil.example", "192.168.1.7") for found in (anonymous, trusting)] == [200, 421]


# ---- Clients, if the server does not listen on loopback addresses only


@pytest.mark.parametrize("address", ["192.168.1.7", "10.0.0.1", "fe80::1", "::ffff:192.168.1.7", "unknown"])
def test_clients_on_other_machines_are_not_served_anonymously(address: str) -> None:
    for found in (application(), application(trusted_hosts=(TODO,))):
        for host in ("localhost", "127.0.0.1", TODO):
            assert [status(found, host, address, path) for path in PATHS] == [421] * len(PATHS)
        assert "ALLOW_ANONYMOUS" in found.get("/docs", environ_overrides={"REMOTE_ADDR": address}).text
        assert status(found, "localhost", address, "/healthz") == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1", ""])
def test_clients_on_the_same_machine_are_served(address: str) -> None:
    assert status(application(), "localhost", address) == 200


def test_the_client_is_the_one_that_has_connected_and_not_one_that_a_proxy_names() -> None:
    client = Client(ProxyFix(application(trusted_hosts=(TODO,)).application, x_for=1))
    sent = {"Host": TODO, "X-Forwarded-For": "192.168.1.7"}
    assert client.get("/docs", headers=sent, environ_overrides={"REMOTE_ADDR": "127.0.0.1"}).status_code == 200
    sent = {"Host": TODO, "X-Forwarded-For": "127.0.0.1"}
    assert client.get("/docs", headers=sent, environ_overrides={"REMOTE_ADDR": "192.168.1.7"}).status_code == 421


# ---- Requests by pages of other origins

# The placeholder is the port of the service. Requests are for 127.0.0.1.
OF_ANOTHER_ORIGIN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "Same-Origin"},  # no browser sends it
    {"Sec-Fetch-Site": "same-origin, same-origin"},
    {"Sec-Fetch-Site": ""},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:{}"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://evil.example:{}"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://127.0.0.1:{}0"},
    {"Origin": "http://127.0.0.2:{}"},
    {"Origin": "http://localhost:{}"},
    {"Origin": "http://127.0.0.1:{}, http://127.0.0.1:{}"},
    {"Origin": "http://127.0.0.1:{} http://evil.example"},
    {"Origin": "http://127.0.0.1:{}.evil.example"},
    {"Origin": "http://127.0.0.1:{}@evil.example"},
    {"Origin": "http://127.0.0.1:{}/"},
    {"Origin": "127.0.0.1:{}"},
    {"Origin": "//127.0.0.1:{}"},
    {"Origin": "ftp://127.0.0.1:{}"},
    {"Origin": "http://"},
    {"Origin": "chrome-extension://abcdefgh"},
]
OF_THE_OWN_ORIGIN = [
    {},
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://todo.example.com"},  # a proxy has changed the Host
    {"Origin": "http://127.0.0.1:{}"},
    {"Origin": "https://127.0.0.1:{}"},  # a proxy may do the TLS
    {"Origin": "HTTP://127.0.0.1:{}"},
]


def filled(headers: dict[str, str], client: httpx.Client) -> dict[str, str]:
    """Return headers with the port of the service."""
    return {name: value.replace("{}", str(client.base_url.port)) for name, value in headers.items()}


@pytest.mark.parametrize("headers", OF_ANOTHER_ORIGIN, ids=str)
def test_a_change_by_a_page_of_another_origin_is_refused(
    client: httpx.Client, db: psycopg.Connection[TupleRow], create: Create, headers: dict[str, str]
) -> None:
    path, sent = f"/api/tasks/{create()['id']}", filled(headers, client)
    before = db.execute("SELECT * FROM tasks").fetchall()
    for method, url, body in (
        ("POST", "/api/tasks", {"title": "x"}),
        ("POST", f"{path}/toggle", None),
        ("PATCH", path, {"title": "x"}),
        ("DELETE", path, None),
        ("PUT", path, None),
        ("POST", "/healthz", None),
        ("POST", "/nope", None),
        ("TRACE", path, None),
    ):
        response = client.request(method, url, headers=sent, json=body)
        assert_problem(response, 403, "cross_origin_refused")
    assert db.execute("SELECT * FROM tasks").fetchall() == before


@pytest.mark.parametrize("headers", OF_ANOTHER_ORIGIN, ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_reading_is_not_refused_but_no_other_origin_may_see_the_response(
    client: httpx.Client, headers: dict[str, str], method: str
) -> None:
    response = client.request(method, "/api/tasks", headers=filled(headers, client))
    assert response.status_code == 200
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("headers", OF_THE_OWN_ORIGIN, ids=str)
def test_a_change_by_a_page_of_the_service_or_by_a_program_is_made(
    client: httpx.Client, create: Create, headers: dict[str, str]
) -> None:
    response = client.post(f"/api/tasks/{create()['id']}/toggle", headers=filled(headers, client))
    assert (response.status_code, response.json()["completed"]) == (200, True)


@pytest.mark.parametrize(
    ("host", "origin", "is_own"),
    [
        (TODO, f"https://{TODO}", True),
        (TODO, f"http://{TODO}", True),
        (TODO.upper(), f"https://{TODO}", True),
        (f"{TODO}.", f"https://{TODO}.", True),
        (f"{TODO}:443", f"https://{TODO}", True),
        (f"{TODO}:", f"https://{TODO}", True),
        (f"{TODO}:80", f"http://{TODO}", True),
        (TODO, f"https://{TODO}:443", True),
        (f"{TODO}:8443", f"https://{TODO}:8443", True),
        ("[FD00::5]:8443", "https://[fd00::5]:8443", True),
        (f"{TODO}:80", f"https://{TODO}", False),
        (f"{TODO}:443", f"http://{TODO}", False),
        (TODO, f"https://{TODO}:8443", False),
        (f"{TODO}:8443", f"https://{TODO}", False),
        (TODO, f"https://{TODO}.evil.example", False),
        (TODO, f"https://a.{TODO}", False),
        ("user@localhost", "https://user@localhost", False),
        ("", "https://", False),
    ],
)
def test_the_origin_has_the_host_and_the_port_of_the_request(host: str, origin: str, is_own: bool) -> None:
    anonymous = application(allow_anonymous=True)
    response = anonymous.post("/nope", headers={"Host": host, "Origin": origin, "X-Forwarded-Host": "evil.example"})
    assert response.status_code == (404 if is_own else 403)


@pytest.mark.parametrize("settings", [{"url_prefix": "/todo"}, {"allow_anonymous": True}], ids=str)
def test_changes_by_other_origins_are_refused_with_other_settings(settings: dict[str, Any]) -> None:
    found = application(**settings)
    assert found.post("/api/tasks", headers={"Origin": "http://evil.example"}).status_code == 403
    assert found.post("/nope", headers={"Origin": "http://localhost"}).status_code == 404


@pytest.mark.parametrize(
    ("allowed", "origin", "expected"),
    [
        ("https://app.example", "https://app.example", 404),
        ("https://app.example", "HTTPS://App.Example", 404),
        ("https://app.example", "http://app.example", 403),
        ("https://app.example", "https://app.example:8443", 403),
        ("https://app.example", "https://app.example, https://app.example", 403),
        ("https://app.example", "null", 403),
        ("https://app.example", None, 403),
        ("*", "https://app.example", 404),
        ("*", "null", 404),
        ("*", None, 404),
    ],
)
def test_pages_of_the_allowed_origins_may_change_tasks(allowed: str, origin: str | None, expected: int) -> None:
    found = application(cors_origins=(allowed,))
    headers = {"Sec-Fetch-Site": "cross-site", **({"Origin": origin} if origin else {})}
    assert found.post("/nope", headers=headers).status_code == expected


def test_the_host_is_checked_before_the_origin_and_both_before_the_body(client: httpx.Client) -> None:
    host, origin = {"Host": "evil.example"}, {"Origin": "http://other.example"}
    for headers, status_code, kind in (
        (host | origin, 421, "misdirected_request"),
        (origin, 403, "cross_origin_refused"),
        ({}, 413, "content_too_large"),
    ):
        assert_problem(client.post("/api/tasks", content=b" " * 70_000, headers=headers), status_code, kind)
