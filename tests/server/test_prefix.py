"""Below a path behind a real nginx: URL_PREFIX if nginx removes the path from the URLs, SCRIPT_NAME if it does not."""

import re
import socket
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.support.fixtures import Start
from tests.support.optional_tools import program
from tests.support.problems import assert_problem
from tests.support.processes import free_port, wait_until
from tests.support.service import Service

PREFIXES = ["/todo", "/a/b.c"]
SETTINGS = {"URL_PREFIX": "removes", "SCRIPT_NAME": "keeps"}
NGINX = """user root; pid pid; events {{}} daemon off;
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server {{
        listen 127.0.0.1:{port};
        location {prefix}/ {{ proxy_pass http://127.0.0.1:{behind}{path}; }}
    }}
}}"""


def start_below(start: Start, folder: Path, setting: str, prefix: str, database_url: str) -> tuple[Service, Service]:
    """Start a service below a path, and an nginx in front. Return both."""
    service = start(DATABASE_URL=database_url, **{setting: prefix})
    port, path = free_port(), "/" if setting == "URL_PREFIX" else ""
    config = NGINX.format(port=port, prefix=prefix, behind=service.port, path=path)
    (folder / "nginx.conf").write_text(config, encoding="utf-8")
    nginx = start(command=[program("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"], PORT=port)
    wait_until(lambda: nginx.answers(f"{prefix}/readyz"))
    return service, nginx


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("setting", SETTINGS, ids=SETTINGS.get)
def test_every_url_of_a_response_begins_with_the_path(
    setting: str, prefix: str, start: Start, tmp_path: Path, database_url: str
) -> None:
    service, nginx = start_below(start, tmp_path, setting, prefix, database_url)
    assert f"its docs at {prefix}/docs, with" in service.log()
    client, tasks = nginx.client, f"{prefix}/api/tasks"
    created = [client.post(tasks, json={"title": "Buy milk"}) for _ in range(2)]
    locations = [response.headers["Location"] for response in created]
    assert locations == [f"{tasks}/{response.json()['id']}" for response in created]
    assert client.get(locations[0]).json() == created[0].json()
    page = client.get(f"{tasks}?limit=1&q=mi")
    [link] = re.findall(r'<(.*)>; rel="next"', page.headers["Link"])
    assert link.startswith(f"{tasks}?limit=1&q=mi&after=")
    assert client.get(link).status_code == 200
    for path in (f"{prefix}/", f"{prefix}/docs/"):
        assert client.get(path).headers["Location"] == f"{prefix}/docs"
    assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": prefix}]
    docs = client.get(f"{prefix}/docs")
    for reference in re.findall(r'(?:src|href)="([^"]*)"', docs.text):
        assert client.get(urljoin(f"{prefix}/docs", reference)).status_code == 200
    assert assert_problem(client.get(f"{prefix}/nope"), 404, "not_found")["instance"] == f"{prefix}/nope"
    assert client.delete(locations[1]).status_code == 200


@pytest.mark.parametrize("setting", SETTINGS, ids=SETTINGS.get)
def test_the_docs_page_can_try_a_call_below_the_path(
    setting: str, start: Start, tmp_path: Path, database_url: str
) -> None:
    chromium = program("chromium")
    _, nginx = start_below(start, tmp_path, setting, "/todo", database_url)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page()
        page.goto(f"{nginx.url}/todo/docs")
        block = page.locator("#operations-tasks-create_task")
        block.locator(".opblock-summary-control").click(timeout=60_000)
        block.locator("button.execute").click()
        shown = block.locator(".live-responses-table .response-col_status").last
        expect(shown).to_contain_text("201", timeout=60_000)
        browser.close()


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/api/tasks", "/todolist", "/todoapi/tasks", "/tod", "//todo/healthz"]
)
def test_a_url_outside_of_script_name_is_not_found(path: str, start: Start, database_url: str) -> None:
    service = start(DATABASE_URL=database_url, SCRIPT_NAME="/todo")
    wait_until(lambda: service.answers("/todo/healthz"))
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: connection.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ")
    assert b"application/problem+json" in head
    assert b'"not_found"' in body
    assert httpx.get(f"{service.url}/todo").headers["Location"] == "/todo/docs"
