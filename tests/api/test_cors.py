"""Pages of other origins: none may call the API until CORS_ORIGINS names theirs."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.service import Service

ORIGIN = "https://app.example"
SECOND = "http://localhost:3000"
OTHERS = [
    "https://other.example",
    "http://app.example",
    "https://app.example:8443",
    "https://app.example.evil.example",
    "https://sub.app.example",
    "https://appxexample",
    "null",
]
EXPOSED = {"ETag", "Link", "Location", "Retry-After", "X-Request-ID"}
HEADERS = ["Content-Type", "If-Match", "If-None-Match", "Idempotency-Key", "X-Request-ID"]
METHODS = {
    "/api/tasks": ["GET", "POST"],
    "/api/tasks/1": ["GET", "PATCH", "DELETE"],
    "/api/tasks/1/toggle": ["POST"],
}
CALLS = [(path, method) for path, methods in METHODS.items() for method in methods]


@pytest.fixture(scope="module")
def shared(service: Service, tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[httpx.Client]:
    """Give a client of a service that two origins may use."""
    assert service
    log = tmp_path_factory.mktemp("cors") / "log"
    running = Service(log, DATABASE_URL=database_url, WEB_CONCURRENCY=1, CORS_ORIGINS=f"{ORIGIN}, {SECOND}").wait()
    yield running.client
    assert running.stop() == 0


def access(response: httpx.Response) -> dict[str, str]:
    """Give the headers of an answer that open it to other origins."""
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


def names(header: str) -> set[str]:
    """Split a list of names."""
    return {name.strip().lower() for name in header.split(",")}


def preflight(client: httpx.Client, path: str, method: str, header: str, origin: str = ORIGIN) -> httpx.Response:
    """Ask as a browser does before it makes a call."""
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": header}
    return client.options(path, headers=asked)


@pytest.mark.parametrize(("path", "method"), CALLS)
def test_no_other_origin_is_let_in_unless_it_is_configured(client: httpx.Client, path: str, method: str) -> None:
    answers = [
        client.request(method, path, headers={"Origin": ORIGIN}),
        preflight(client, path, method, "content-type"),
    ]
    assert [access(answer) for answer in answers] == [{}, {}]


@pytest.mark.parametrize("origin", [ORIGIN, SECOND])
@pytest.mark.parametrize(("path", "method"), CALLS)
def test_each_call_with_each_header_is_let_in(shared: httpx.Client, path: str, method: str, origin: str) -> None:
    for header in [*HEADERS, ", ".join(sorted(map(str.lower, HEADERS)))]:
        answer = preflight(shared, path, method, header, origin)
        assert answer.status_code == 200
        allowed = access(answer)
        assert allowed["access-control-allow-origin"] == origin
        assert method in allowed["access-control-allow-methods"].split(", ")
        assert names(header) <= names(allowed["access-control-allow-headers"])
        assert int(allowed["access-control-max-age"]) > 0
        assert "access-control-allow-credentials" not in allowed
        assert "Origin" in answer.headers["Vary"]


def test_every_answer_is_open_to_the_origin_with_its_headers(shared: httpx.Client) -> None:
    def call(method: str, path: str, **headers: str) -> httpx.Response:
        sent = {"Origin": ORIGIN} | {name.replace("_", "-"): value for name, value in headers.items()}
        return shared.request(method, path, headers=sent, json={"title": "x"} if method in {"POST", "PATCH"} else None)

    created = call("POST", "/api/tasks", Idempotency_Key="cors")
    path = created.headers["Location"]
    answers = [
        (201, created),
        (422, shared.post("/api/tasks", json={"title": "y"}, headers={"Origin": ORIGIN, "Idempotency-Key": "cors"})),
        (200, call("GET", "/api/tasks?limit=1")),
        (200, call("GET", path)),
        (304, call("GET", path, If_None_Match=created.headers["ETag"])),
        (200, call("PATCH", path)),
        (412, call("PATCH", path, If_Match='"99"')),
        (200, call("POST", f"{path}/toggle")),
        (200, call("DELETE", path)),
        (404, call("DELETE", path)),
        (404, call("GET", "/api/nothing")),
        (405, call("PUT", "/api/tasks")),
        (400, call("GET", "/api/tasks?limit=0")),
        (413, shared.post("/api/tasks", content=b" " * 70_000, headers={"Origin": ORIGIN})),
        (415, shared.post("/api/tasks", content=b"x", headers={"Origin": ORIGIN})),
    ]
    for status, answer in answers:
        assert answer.status_code == status
        allowed = access(answer)
        assert allowed["access-control-allow-origin"] == ORIGIN
        assert names(allowed["access-control-expose-headers"]) == set(map(str.lower, EXPOSED))
        assert "access-control-allow-credentials" not in allowed
        assert "Origin" in answer.headers["Vary"]


@pytest.mark.parametrize("origin", OTHERS)
def test_other_origins_are_not_let_in(shared: httpx.Client, origin: str) -> None:
    answers = [
        shared.get("/api/tasks", headers={"Origin": origin}),
        preflight(shared, "/api/tasks/1", "DELETE", "if-match", origin),
    ]
    assert [access(answer) for answer in answers] == [{}, {}]


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/healthz", "/readyz"])
def test_only_the_api_is_open(shared: httpx.Client, path: str) -> None:
    assert access(shared.get(path, headers={"Origin": ORIGIN})) == {}


def test_methods_and_headers_that_the_api_does_not_have_are_not_offered(shared: httpx.Client) -> None:
    assert "access-control-allow-methods" not in access(preflight(shared, "/api/tasks", "PUT", "content-type"))
    allowed = access(preflight(shared, "/api/tasks", "GET", "authorization, x-other, if-match"))
    assert names(allowed["access-control-allow-headers"]) == {"if-match"}
