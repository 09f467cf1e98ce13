"""Problems: every failure has the same format, and the headers of its status."""

from collections.abc import Iterator

import httpx
import psycopg
import pytest

from tests.support.databases import as_url, new_database
from tests.support.problems import assert_problem
from tests.support.processes import free_port, wait_until
from tests.support.service import Service
from todo_api.api import problems

OF_THE_SERVICE = "FROM pg_stat_activity WHERE application_name = 'todo_api' AND datname = current_database()"
UNREACHABLE = "postgresql://todo:secret@127.0.0.1:{port}/todo"


@pytest.mark.parametrize(
    "path",
    ["/nope", "/api", "/api/", "/api/tasks/", "/api//tasks", "/api/tasks/1/", "/api/tasks/1/on", "/docs/nope"],
)
def test_an_unknown_url_returns_404(client: httpx.Client, path: str) -> None:
    problem = assert_problem(client.get(path), 404, "not_found")
    assert (problem["instance"], problem["detail"]) == (path, problems.KINDS[404][1])


def test_the_instance_is_a_uri_reference(client: httpx.Client) -> None:
    path = "/nope%0A%22%C3%A9%3Cb%3E"
    assert assert_problem(client.get(path), 404, "not_found")["instance"] == path


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/tasks", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("DELETE", "/api/tasks", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("POST", "/api/tasks/1", {"GET", "HEAD", "OPTIONS", "PATCH", "DELETE"}),
        ("PUT", "/api/tasks/1", {"GET", "HEAD", "OPTIONS", "PATCH", "DELETE"}),
        ("GET", "/api/tasks/1/toggle", {"OPTIONS", "POST"}),
        ("POST", "/healthz", {"GET", "HEAD", "OPTIONS"}),
        ("BREW", "/api/tasks", {"GET", "HEAD", "OPTIONS", "POST"}),
    ],
)
def test_an_unsupported_method_returns_405_with_allow(
    client: httpx.Client, method: str, path: str, allowed: set[str]
) -> None:
    response = client.request(method, path)
    assert_problem(response, 405, "method_not_allowed")
    assert set(response.headers["Allow"].split(", ")) == allowed


def test_the_problem_for_an_unknown_task_names_the_reason(client: httpx.Client) -> None:
    assert assert_problem(client.get("/api/tasks/9223372036854775807"), 404, "not_found")["detail"] == "No such task"


def test_an_id_beyond_64_bits_returns_404_or_405_without_a_database(disconnected: Service) -> None:
    path = "/api/tasks/9223372036854775808"
    for method in ("GET", "PATCH", "DELETE"):
        assert assert_problem(disconnected.client.request(method, path), 404, "not_found")["detail"] == "No such task"
    assert_problem(disconnected.client.post(path), 405, "method_not_allowed")


@pytest.fixture(scope="module")
def broken_service(tmp_path_factory: pytest.TempPathFactory, conninfo: str) -> Iterator[Service]:
    """Run a service whose table has a trigger that fails."""
    with new_database(conninfo) as database:
        log = tmp_path_factory.mktemp("broken") / "log"
        service = Service(log, DATABASE_URL=as_url(database), WEB_CONCURRENCY=1).wait()
        with psycopg.connect(database) as db:
            db.execute(
                "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''of a trigger''; END';"
                "CREATE TRIGGER fail BEFORE INSERT ON tasks EXECUTE FUNCTION fail()"
            )
        yield service
        assert service.stop() == 0


def test_a_bug_returns_500_and_only_the_log_has_its_traceback(broken_service: Service) -> None:
    headers = {"X-Request-ID": "find-me-in-the-log"}
    response = broken_service.client.post("/api/tasks", json={"title": "Buy milk"}, headers=headers)
    problem = assert_problem(response, 500, "internal_error")
    assert "trigger" not in response.text
    assert "INSERT" not in response.text
    assert problem["instance"] == "/api/tasks"
    assert response.headers["X-Request-ID"] == "find-me-in-the-log"
    log = broken_service.log()
    assert "Exception on POST /api/tasks find-me-in-the-log\nTraceback" in log
    assert "RaiseException" in log
    assert "POST /api/tasks 500" in log


@pytest.fixture(scope="module")
def disconnected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service whose database cannot be reached."""
    url = UNREACHABLE.format(port=free_port())
    service = Service(tmp_path_factory.mktemp("disconnected") / "log", DATABASE_URL=url, WEB_CONCURRENCY=1)
    wait_until(lambda: service.answers("/healthz"))
    yield service
    assert service.stop() == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/tasks"),
        ("POST", "/api/tasks"),
        ("GET", "/api/tasks/1"),
        ("PATCH", "/api/tasks/1"),
        ("DELETE", "/api/tasks/1"),
        ("POST", "/api/tasks/1/toggle"),
        ("GET", "/readyz"),
    ],
)
def test_every_call_returns_503_with_retry_after_if_the_database_cannot_be_reached(
    disconnected: Service, method: str, path: str
) -> None:
    body = {"title": "x"} if path in {"/api/tasks", "/api/tasks/1"} and method in {"POST", "PATCH"} else None
    response = disconnected.client.request(method, path, json=body)
    assert_problem(response, 503, "database_unavailable")
    assert int(response.headers["Retry-After"]) >= 1


def test_health_and_docs_need_no_database(disconnected: Service) -> None:
    assert [disconnected.client.get(path).status_code for path in ("/healthz", "/docs", "/openapi.json")] == [200] * 3
    assert_problem(disconnected.client.get("/nope"), 404, "not_found")


def test_neither_the_log_nor_a_response_contains_the_password(disconnected: Service) -> None:
    assert "secret" not in disconnected.client.get("/api/tasks").text
    log = disconnected.log()
    assert "cannot be reached" in log
    assert "secret" not in log
    assert "Traceback" not in log


def test_no_request_fails_after_the_server_has_terminated_idle_connections(service: Service, conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as db:
        for _ in range(3):
            assert {service.client.get("/api/tasks").status_code for _ in range(20)} == {200}
            assert db.execute(f"SELECT pg_terminate_backend(pid) {OF_THE_SERVICE}").fetchall()
            wait_until(lambda: not db.execute(f"SELECT pid {OF_THE_SERVICE}").fetchall())
