"""The request id of each response, its line in the log, and the nosniff header."""

import re

import httpx
import pytest

from tests.support.service import Service


@pytest.mark.parametrize("request_id", ["abc-123", "a" * 128, "00-4bf92f3577b34da6-00f067aa-01", "user@host:1/2=+."])
def test_a_valid_request_id_is_returned_and_logged(client: httpx.Client, service: Service, request_id: str) -> None:
    response = client.get("/api/tasks/1/nope", headers={"X-Request-ID": request_id})
    assert response.headers["X-Request-ID"] == request_id
    assert re.search(rf"GET /api/tasks/1/nope 404 [\d.]+ms {re.escape(request_id)}$", service.log(), re.MULTILINE)


@pytest.mark.parametrize(
    "request_id", [None, b"", b"a" * 129, b"two words", b'quo"te', b"new\tline", b"<b>", b"\xc3\xa9"]
)
def test_a_missing_or_invalid_request_id_is_replaced(client: httpx.Client, request_id: bytes | None) -> None:
    headers = {} if request_id is None else {b"X-Request-ID": request_id}
    new_ids = {client.get("/healthz", headers=headers).headers["X-Request-ID"] for _ in range(2)}
    assert len(new_ids) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", new_id) for new_id in new_ids)


@pytest.mark.parametrize("path", ["/api/tasks", "/nope", "/docs", "/openapi.json", "/healthz", "/docs/swagger-ui.css"])
def test_every_response_has_a_request_id_and_forbids_content_sniffing(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["X-Request-ID"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_path_cannot_forge_a_log_line(client: httpx.Client, service: Service) -> None:
    client.get("/nope%0AINFO%20forged%1B[31m", headers={"X-Request-ID": "forged-path"})
    lines = [line for line in service.log().splitlines() if line.endswith("forged-path")]
    assert len(lines) == 1
    assert "/nope%0AINFO%20forged%1B" in lines[0]


def test_the_log_does_not_contain_text_of_tasks(client: httpx.Client, service: Service) -> None:
    client.post("/api/tasks", json={"title": "a very private title"})
    client.get("/api/tasks?q=a+very+private+search")
    assert "very" not in service.log()
