"""Every answer carries an id that its log line has too, and headers that make browsers careful."""

import re

import httpx
import pytest

from tests.support.service import Service


@pytest.mark.parametrize("given", ["abc-123", "a" * 128, "00-4bf92f3577b34da6-00f067aa-01", "user@host:1/2=+."])
def test_a_sane_request_id_comes_back_and_is_in_the_log(client: httpx.Client, service: Service, given: str) -> None:
    response = client.get("/api/tasks/1/nope", headers={"X-Request-ID": given})
    assert response.headers["X-Request-ID"] == given
    assert re.search(rf"GET /api/tasks/1/nope 404 [\d.]+ms {re.escape(given)}$", service.log(), re.MULTILINE)


@pytest.mark.parametrize("given", [None, b"", b"a" * 129, b"two words", b'quo"te', b"new\tline", b"<b>", b"\xc3\xa9"])
def test_another_request_id_is_replaced(client: httpx.Client, given: bytes | None) -> None:
    headers = {} if given is None else {b"X-Request-ID": given}
    ids = {client.get("/healthz", headers=headers).headers["X-Request-ID"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", new) for new in ids)


@pytest.mark.parametrize("path", ["/api/tasks", "/nope", "/docs", "/openapi.json", "/healthz", "/docs/swagger-ui.css"])
def test_every_answer_has_an_id_and_is_not_sniffed(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["X-Request-ID"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_path_cannot_break_a_log_line(client: httpx.Client, service: Service) -> None:
    client.get("/nope%0AINFO%20forged%1B[31m", headers={"X-Request-ID": "forged-path"})
    lines = [line for line in service.log().splitlines() if line.endswith("forged-path")]
    assert len(lines) == 1
    assert "/nope%0AINFO%20forged%1B" in lines[0]


def test_the_log_does_not_have_what_tasks_say(client: httpx.Client, service: Service) -> None:
    client.post("/api/tasks", json={"title": "a very private title"})
    client.get("/api/tasks?q=a+very+private+search")
    assert "very" not in service.log()
