"""The log: its formats and levels, the lines of requests, and what is never in it."""

import json
import re
import signal
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.support.commands import FLASK
from tests.support.databases import as_url, new_database
from tests.support.fixtures import Start
from tests.support.issuer import Issuer, SigningKey, bearer, running_issuer
from tests.support.postgres import Postgres
from tests.support.processes import free_port, wait_until
from tests.support.service import Service, workers

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
FAILING = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''of a trigger''; END';
    CREATE TRIGGER fail BEFORE INSERT ON tasks EXECUTE FUNCTION fail();
"""
Json = dict[str, Any]


def objects(service: Service) -> list[Json]:
    """Return the log with LOG_FORMAT=json. Every line must be an object with the members that all have."""
    found = [json.loads(line) for line in service.log().splitlines()]
    for one in found:
        assert list(one)[:5] == ["time", "level", "logger", "pid", "message"]
        assert datetime.fromisoformat(one["time"]).utcoffset() is not None
        assert one["level"] in {"debug", "info", "warning", "error", "critical"}
    return found


def line_of(service: Service, request_id: str) -> Json:
    """Return the object of a request."""
    found: list[Json] = []

    def is_there() -> bool:
        found[:] = [one for one in objects(service) if one["message"].split(" ")[4:5] == [request_id]]
        return bool(found)

    wait_until(is_there)
    [one] = found
    return one


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """Run an issuer of tokens."""
    with running_issuer(KEY) as running:
        yield running


KEY = SigningKey()


@pytest.fixture(scope="module")
def services(
    tmp_path_factory: pytest.TempPathFactory, database_url: str, issuer: Issuer
) -> Iterator[dict[str, Service]]:
    """Run a service with tokens for each format."""
    folder = tmp_path_factory.mktemp("logs")
    settings = {"DATABASE_URL": database_url, "WEB_CONCURRENCY": 1, **issuer.settings()}
    running = {name: Service(folder / name, LOG_FORMAT=name, **settings).wait() for name in ("text", "json")}
    yield running
    assert [service.stop() for service in running.values()] == [0, 0]


def test_the_line_of_a_request_has_its_route_status_duration_id_trace_and_user(services: dict[str, Service]) -> None:
    for user, quoted in (("alice", "alice"), ("auth0|a b@c", "auth0|a%20b@c"), ("zoë", "zo%C3%AB"), ('"\\', "%22%5C")):
        name = f"mine-{len(user)}{user[0].encode().hex()}"
        headers = {"X-Request-ID": name, "traceparent": f"00-{TRACE}-{SPAN}-01", **bearer(KEY.token(user))}
        for service in services.values():
            wait_until(partial(has_keys, service))
            assert service.client.get("/api/tasks/1?q=secret", headers=headers).status_code == httpx.codes.NOT_FOUND
        line = rf"(?m)^\d{{4}}-\S+ \S+ INFO todo_api\.access: GET /api/tasks/1 404 \d+\.\dms {name} (.*)$"
        assert re.findall(line, services["text"].log()) == [f"trace_id={TRACE} user={quoted}"]
        found = [one for one in objects(services["json"]) if one.get("request_id") == name and one["status"] == 404]
        assert len(found) == 1
        assert 0 < found[0].pop("duration_ms") < 60_000
        assert {key: found[0][key] for key in list(found[0])[5:]} == {
            "method": "GET",
            "path": "/api/tasks/1",
            "route": "/api/tasks/{task_id}",
            "status": 404,
            "request_id": name,
            "trace_id": TRACE,
            "user": user,
        }
    assert "secret" not in services["text"].log() + services["json"].log()


def has_keys(service: Service) -> bool:
    """Return whether a service has the keys of tokens."""
    return service.client.get("/api/tasks?limit=1", headers=bearer(KEY.token())).is_success


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (f"00-{TRACE}-{SPAN}-01", TRACE),
        (f"00-{TRACE}-{SPAN}-00", TRACE),
        (f"cc-{TRACE}-{SPAN}-01", TRACE),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", TRACE),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"cc-{TRACE}-{SPAN}-01.more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"00-{TRACE[1:]}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}-01, 00-{TRACE}-{SPAN}-01", None),
        ("00-\u0664" * 8, None),
        ("", None),
    ],
)
def test_only_a_valid_traceparent_counts(services: dict[str, Service], traceparent: str, trace_id: str | None) -> None:
    name = f"trace-{abs(hash(traceparent))}"
    headers = [(b"X-Request-ID", name.encode()), (b"Traceparent", traceparent.encode())]
    assert services["json"].client.get("/docs", headers=headers).is_success
    assert line_of(services["json"], name).get("trace_id") == trace_id


def test_a_token_is_not_logged_even_if_it_is_in_the_wrong_place(services: dict[str, Service]) -> None:
    token = KEY.sign({"sub": "x"}, kid=..., typ=...)
    assert len(token) <= 128 + len("eyJhbGciOiJFZERTQSJ9")
    short = ".".join([*token.split(".")[:2], "short"])
    parts = [part for part in token.split(".") if len(part) >= 12]
    for service in services.values():
        for given in (short, f"Bearer:{short}", *parts):
            response = service.client.get("/docs", headers={"X-Request-ID": given, **bearer(token)})
            assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])
        for path in (f"/{token}", f"/api/tasks/{token}", f"/docs/{token}/x", f"/%65{token[1:]}"):
            assert service.client.get(path, headers=bearer("x")).status_code in {401, 404}
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
            connection.sendall(f"GET /{short} HTTP/9.9\r\n\r\n".encode())
            assert connection.recv(65_536).startswith(b"HTTP/1.1 400")
        for part in (*parts, "short"):
            assert part not in service.log()
    kept = services["text"].client.get("/docs", headers={"X-Request-ID": "key.eye.EyJ", **bearer(token)})
    assert kept.headers["X-Request-ID"] == "key.eye.EyJ"


def test_each_line_is_a_json_object_whatever_happens(tmp_path: Path, start: Start) -> None:
    postgres = Postgres(tmp_path / "server")
    service = start(
        command=[sys.executable, "-W", "always", "wsgi.py", "--reload"],
        DATABASE_URL=as_url(postgres.conninfo),
        LOG_FORMAT="json",
        DRAIN_SECONDS=1,
    ).wait()
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute(FAILING)
    traced = {"X-Request-ID": "failing", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    assert service.client.post("/api/tasks", json={"title": "x"}, headers=traced).status_code == 500
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        refused = connection.recv(65_536).decode()
    [worker] = workers(service)
    service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not worker.is_running())
    [worker] = workers(service)
    worker.kill()
    wait_until(lambda: not worker.is_running() and len(workers(service)) == 1)
    postgres.kill()
    wait_until(lambda: httpx.get(f"{service.url}/readyz").status_code == 503)
    assert service.stop() == 0
    found = objects(service)
    messages = [one["message"] for one in found]
    for part in ("applying migration", "serving http", "--reload is ignored", "SIGHUP replaces", "draining: /readyz"):
        assert sum(part in message for message in messages) >= 1, part
    [bug] = [one for one in found if "traceback" in one]
    assert (bug["message"], bug["level"]) == (f"Exception on POST /api/tasks failing trace_id={TRACE}", "error")
    assert (bug["request_id"], bug["trace_id"]) == ("failing", TRACE)
    assert bug["traceback"].startswith("Traceback (most recent call last):\n")
    assert "of a trigger" in bug["traceback"]
    [killed] = [one for one in found if "was sent SIGKILL" in one["message"]]
    assert (killed["logger"], killed["level"]) == ("gunicorn.error", "error")
    [unreadable] = [one for one in found if one["logger"] == "todo_api.server.unreadable"]
    assert (unreadable["client"], unreadable["status"]) == ("127.0.0.1", 400)
    assert f"X-Request-ID: {unreadable['request_id']}" in refused
    assert [one["level"] for one in found if one["logger"] == "todo_api.database.outage"] == ["warning"]


def test_the_embedded_postgresql_and_debugging_write_json_too(tmp_path: Path, start: Start) -> None:
    service = start(DATA_DIR=tmp_path / "data", LOG_FORMAT="json", LOG_LEVEL="debug").wait()
    assert service.client.get("/api/tasks").is_success
    assert service.stop() == 0
    messages = [one["message"] for one in objects(service)]
    for part in (
        "creating a new PostgreSQL cluster",
        "to use PostgreSQL with psql",
        "Current configuration",
        "Booting worker",
    ):
        assert [message for message in messages if part in message], part


@pytest.mark.parametrize(
    ("arguments", "settings", "part"),
    [
        ([], {"WEB_THREADS": "abc"}, "WEB_THREADS"),
        ([], {"LOG_LEVEL": "loud"}, "LOG_LEVEL"),
        (["--workers", "0"], {}, "--workers must be between 1 and 256"),
        (["--bind", "fd://77"], {}, "Bad file descriptor"),
        (["--no-such-option"], {}, "unrecognized arguments: --no-such-option"),
    ],
    ids=str,
)
def test_the_reason_why_a_start_ends_is_json_too(
    arguments: list[str], settings: dict[str, str], part: str, start: Start, database_url: str
) -> None:
    command = [sys.executable, "wsgi.py", *arguments]
    service = start(command=command, LOG_FORMAT="json", DATABASE_URL=database_url, **settings)
    assert service.process.wait(timeout=120) not in {0, None}
    found = [one for one in objects(service) if one["level"] in {"error", "critical"}]
    assert [one for one in found if part in one["message"]]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["no-such-command"], "No such command 'no-such-command'"),
        (["backup"], "Missing argument 'FILE'"),
        (["restore", "missing"], "missing: No such file or directory"),
        (["openapi", "write", "/missing/file"], "/missing/file"),
    ],
    ids=str,
)
def test_the_reason_why_a_command_ends_is_json_too(
    arguments: list[str], part: str, start: Start, database_url: str
) -> None:
    service = start(command=[*FLASK, *arguments], LOG_FORMAT="json", DATABASE_URL=database_url)
    assert service.process.wait(timeout=120) not in {0, None}
    assert [one for one in objects(service) if part in one["message"]]


UNCAUGHT = """
import sys, threading, warnings
from wsgi import app
warnings.warn("a warning of a library")
def fail(): raise ValueError("in a thread")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
print("printed\\n\\nin lines", file=sys.stderr)
raise ValueError("in the main thread")
"""


def test_warnings_uncaught_exceptions_and_prints_are_json_too(start: Start, conninfo: str) -> None:
    with new_database(conninfo) as database:
        service = start(command=[sys.executable, "-c", UNCAUGHT], DATABASE_URL=as_url(database), LOG_FORMAT="json")
        assert service.process.wait(timeout=120) == 1
    found = objects(service)
    assert [one["level"] for one in found if "a warning of a library" in one["message"]] == ["warning"]
    assert [one["message"] for one in found if one["logger"] == "stderr"] == ["printed", "in lines"]
    last = [one["traceback"].splitlines()[-1] for one in found if one["level"] == "critical"]
    assert last == ["ValueError: in a thread", "ValueError: in the main thread"]


@pytest.mark.parametrize(
    ("level", "loggers"),
    [
        ("info", {"todo_api.access", "todo_api", "todo_api.database.migrations", "todo_api.server.unreadable"}),
        ("Warning", {"todo_api.server.unreadable", "todo_api"}),
        ("error", set()),
    ],
)
def test_the_level_decides_what_is_logged(level: str, loggers: set[str], start: Start, conninfo: str) -> None:
    with new_database(conninfo) as database:
        settings = {"DATABASE_URL": as_url(database), "LOG_FORMAT": "json", "LOG_LEVEL": level}
        service = start(command=[sys.executable, "wsgi.py", "--reload"], **settings).wait()
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
            connection.sendall(b"GARBAGE\r\n\r\n")
            assert connection.recv(65_536)
        assert service.stop() == 0
    assert {one["logger"] for one in objects(service)} >= loggers
    assert {one["logger"] for one in objects(service)} <= loggers | {"todo_api.database.role"}
    known = {"info": {"info", "warning"}, "Warning": {"warning"}, "error": set()}[level]
    assert {one["level"] for one in objects(service)} == known
    assert service.log() or level == "error"


def test_the_text_format_has_the_same_lines_as_without_the_setting(start: Start, database_url: str) -> None:
    port = free_port()
    service = start(DATABASE_URL=database_url, PORT=port, LOG_FORMAT="text").wait()
    service.client.get("/nope", headers={"X-Request-ID": "mine"})
    assert service.stop() == 0
    prefix = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO"
    assert re.search(rf"(?m)^{prefix} todo_api\.access: GET /nope 404 \d+\.\dms mine$", service.log())
