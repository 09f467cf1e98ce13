"""CORS: pages of other origins may call the API only if CORS_ORIGINS lists their origin."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.service import Service

ORIGIN = "https://app.example"
SECOND_ORIGIN = "http://localhost:3000"
OTHER_ORIGINS = [
    "https://other.example",
    "http://app.example",
    "https://app.example:8443",
    "https://app.example.evil.example",
    "https://sub.app.example",
    "https://appxexample",
    "null",
]
EXPOSED_HEADERS = {"ETag", "Link", "Location", "Retry-After", "WWW-Authenticate", "X-Request-ID"}
REQUEST_HEADERS = [
    *("Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key"),
    *("Traceparent", "Tracestate", "X-Request-ID"),
]
METHODS = {
    "/api/tasks": ["GET", "POST"],
    "/api/tasks/1": ["GET", "PATCH", "DELETE"],
    "/api/tasks/1/toggle": ["POST"],
}
CALLS = [(path, method) for path, methods in METHODS.items() for method in methods]


@pytest.fixture(scope="module")
def cors_client(
    service: Service, tmp_path_factory: pytest.TempPathFactory, database_url: str
) -> Iterator[httpx.Client]:
    """Run a service that allows two origins, and return its client."""
    assert service
    log = tmp_path_factory.mktemp("cors") / "log"
    running = Service(
        log, DATABASE_URL=database_url, WEB_CONCURRENCY=1, CORS_ORIGINS=f"{ORIGIN}, {SECOND_ORIGIN}"
    ).wait()
    yield running.client
    assert running.stop() == 0


def cors_headers(response: httpx.Response) -> dict[str, str]:
    """Return the headers of a response that give other origins access to it."""
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


def lower_case_names(header: str) -> set[str]:
    """Return the names that a header lists, in lower case."""
    return {name.strip().lower() for name in header.split(",")}


def preflight(client: httpx.Client, path: str, method: str, header: str, origin: str = ORIGIN) -> httpx.Response:
    """Send the request that a browser sends before a call, and return the response."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": header}
    return client.options(path, headers=headers)


@pytest.mark.parametrize(("path", "method"), CALLS)
def test_no_other_origin_is_allowed_by_default(client: httpx.Client, path: str, method: str) -> None:
    responses = [
        client.request(method, path, headers={"Origin": ORIGIN}),
        preflight(client, path, method, "content-type"),
    ]
    assert [cors_headers(response) for response in responses] == [{}, {}]


@pytest.mark.parametrize("origin", [ORIGIN, SECOND_ORIGIN])
@pytest.mark.parametrize(("path", "method"), CALLS)
def test_a_preflight_request_allows_every_call_and_header(
    cors_client: httpx.Client, path: str, method: str, origin: str
) -> None:
    for header in [*REQUEST_HEADERS, ", ".join(sorted(map(str.lower, REQUEST_HEADERS)))]:
        response = preflight(cors_client, path, method, header, origin)
        assert response.status_code == 200
        allowed = cors_headers(response)
        assert allowed["access-control-allow-origin"] == origin
        assert method in allowed["access-control-allow-methods"].split(", ")
        assert lower_case_names(header) <= lower_case_names(allowed["access-control-allow-headers"])
        assert int(allowed["access-control-max-age"]) > 0
        assert "access-control-allow-credentials" not in allowed
        assert "Origin" in response.headers["Vary"]


def test_every_response_allows_the_origin_to_read_its_headers(cors_client: httpx.Client) -> None:
    def call(method: str, path: str, **headers: str) -> httpx.Response:
        sent = {"Origin": ORIGIN} | {name.replace("_", "-"): value for name, value in headers.items()}
        return cors_client.request(
            method, path, headers=sent, json={"title": "x"} if method in {"POST", "PATCH"} else None
        )

    created = call("POST", "/api/tasks", Idempotency_Key="cors")
    path = created.headers["Location"]
    responses = [
        (201, created),
        (
            422,
            cors_client.post("/api/tasks", json={"title": "y"}, headers={"Origin": ORIGIN, "Idempotency-Key": "cors"}),
        ),
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
        (413, cors_client.post("/api/tasks", content=b" " * 70_000, headers={"Origin": ORIGIN})),
        (415, cors_client.post("/api/tasks", content=b"x", headers={"Origin": ORIGIN})),
    ]
    for status, response in responses:
        assert response.status_code == status
        allowed = cors_headers(response)
        assert allowed["access-control-allow-origin"] == ORIGIN
        assert lower_case_names(allowed["access-control-expose-headers"]) == set(map(str.lower, EXPOSED_HEADERS))
        assert "access-control-allow-credentials" not in allowed
        assert "Origin" in response.headers["Vary"]


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_other_origins_are_not_allowed(cors_client: httpx.Client, origin: str) -> None:
    responses = [
        cors_client.get("/api/tasks", headers={"Origin": origin}),
        preflight(cors_client, "/api/tasks/1", "DELETE", "if-match", origin),
    ]
    assert [cors_headers(response) for response in responses] == [{}, {}]


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/healthz", "/readyz"])
def test_cors_applies_only_to_the_api(cors_client: httpx.Client, path: str) -> None:
    assert cors_headers(cors_client.get(path, headers={"Origin": ORIGIN})) == {}


def test_methods_and_headers_that_the_api_does_not_have_are_not_allowed(cors_client: httpx.Client) -> None:
    assert "access-control-allow-methods" not in cors_headers(
        preflight(cors_client, "/api/tasks", "PUT", "content-type")
    )
    allowed = cors_headers(preflight(cors_client, "/api/tasks", "GET", "cookie, x-other, if-match"))
    assert lower_case_names(allowed["access-control-allow-headers"]) == {"if-match"}
