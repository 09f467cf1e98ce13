"""A real browser, Chromium, on the docs page and on a front end of another origin."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.support.optional_tools import program
from tests.support.service import Service

pytestmark = pytest.mark.usefixtures("db")  # no task is there from other tests

expect.set_options(timeout=60_000)  # milliseconds; a busy machine takes more than the usual 5 s

CALLS = ["list_tasks", "create_task", "get_task", "update_task", "delete_task", "toggle_task"]

# What a front end does with the API, each call with fetch(), and what it can read of the answers.
FRONT_END = """async (tasks) => {
  const call = async (path, method = "GET", body = undefined, headers = {}) => {
    const type = body ? {"Content-Type": "application/json"} : {};
    const request = {method, body: JSON.stringify(body), headers: {...type, ...headers}};
    const answer = await fetch(new URL(path, tasks), request);
    const seen = ["ETag", "Link", "Location", "X-Request-ID"].map(name => [name, answer.headers.get(name)]);
    return {status: answer.status, body: await answer.json(), ...Object.fromEntries(seen)};
  };
  const key = {"Idempotency-Key": "front-end"};
  const created = await call(tasks, "POST", {title: "First"}, {"X-Request-ID": "from-a-browser", ...key});
  const again = await call(tasks, "POST", {title: "First"}, key);
  await call(tasks, "POST", {title: "Second"});
  const toggled = await call(created.Location + "/toggle", "POST", undefined, {"If-Match": created.ETag});
  const pages = [await call(tasks + "?limit=1")];
  while (pages.at(-1).Link) pages.push(await call(pages.at(-1).Link.match(/<(.*)>; rel="next"/)[1]));
  const patched = await call(created.Location, "PATCH", {description: "changed"});
  const stale = await call(created.Location, "DELETE", undefined, {"If-Match": toggled.ETag});
  const deleted = await call(created.Location, "DELETE", undefined, {"If-Match": patched.ETag});
  return {created, again, toggled, pages, patched, stale, deleted, gone: await call(created.Location)};
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run the distribution's Chromium, without a window."""
    chromium = program("chromium")
    with sync_playwright() as playwright:
        # Its sandbox, off by Playwright's default, does not start as root.
        running = playwright.chromium.launch(executable_path=chromium)
        yield running
        running.close()


class Visit:
    """A page of the browser's, and what happened on it."""

    def __init__(self, page: Page) -> None:
        """Note every request, and every message that is more than information."""
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._read)

    def _read(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def origins(self) -> set[str]:
        """Give the origins that it asked for anything; data: and blob: URLs ask nobody."""
        addresses = [urlsplit(url) for url in self.requests]
        return {f"{url.scheme}://{url.netloc}" for url in addresses if url.scheme not in {"data", "blob"}}


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Give a page with nothing kept from other tests."""
    context = browser.new_context()
    context.set_default_timeout(60_000)
    yield Visit(context.new_page())
    context.close()


@pytest.fixture
def docs(visit: Visit, service: Service) -> Visit:
    """Give the docs page, rendered."""
    visit.page.goto(f"{service.url}/docs")
    expect(visit.page.locator(".opblock")).to_have_count(len(CALLS))
    return visit


def execute(page: Page, call: str, *, body: str | None = None, task_id: int | None = None) -> Any:
    """Try a call out on the docs page: give the status and the body that the page then shows."""
    block = page.locator(f"#operations-tasks-{call}")
    if "is-open" not in (block.get_attribute("class") or ""):
        block.locator(".opblock-summary-control").click()
    if body is not None:
        block.locator("textarea.body-param__text").fill(body)
    if task_id is not None:
        block.locator("tr[data-param-name=task_id] input").fill(str(task_id))
    with page.expect_response(lambda response: "/api/tasks" in response.url) as answered:
        block.locator("button.execute").click()
    answer = answered.value
    expect(block.locator(".live-responses-table .response-col_status").last).to_contain_text(str(answer.status))
    return answer.status, answer.json()


def test_the_docs_page_shows_every_call_and_loads_nothing_from_elsewhere(docs: Visit, service: Service) -> None:
    for call in CALLS:
        block = docs.page.locator(f"#operations-tasks-{call}")
        block.locator(".opblock-summary-control").click()
        expect(block.locator(".responses-table .response").first).to_be_visible()
        expect(block.locator("button.execute")).to_be_visible()
    expect(docs.page.locator(".errors-wrapper")).to_have_count(0)
    assert docs.origins() == {service.url}
    assert docs.complaints == []


def test_a_task_that_is_tried_out_on_the_docs_page_is_created_and_listed(docs: Visit, service: Service) -> None:
    for title in ("One", "Two"):  # nothing that the page fills in, such as a key, makes the second fail
        status, task = execute(docs.page, "create_task", body=f'{{"title": "{title}"}}')
        assert (status, task["title"]) == (201, title)
    status, tasks = execute(docs.page, "list_tasks")
    assert (status, [task["title"] for task in tasks]) == (200, ["Two", "One"])
    assert docs.origins() == {service.url}
    assert docs.complaints == []


def test_the_calls_of_one_task_work_on_the_docs_page(docs: Visit) -> None:
    _, created = execute(docs.page, "create_task")  # the example, as the page fills it in
    for call in ("get_task", "toggle_task", "update_task", "delete_task"):
        status, task = execute(docs.page, call, task_id=created["id"])
        assert (status, task["id"]) == (200, created["id"]), call
    assert docs.complaints == []


class FrontEnd(http.server.BaseHTTPRequestHandler):
    """Serves an empty page, in which a test runs its script."""

    def do_GET(self) -> None:
        """Serve the page, whatever the path."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Front end</title><link rel=icon href=data:,>")

    def log_message(self, *_args: object) -> None:
        """Log nothing."""


@contextmanager
def front_end() -> Iterator[int]:
    """Serve a front end, and give its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FrontEnd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def origin() -> Iterator[str]:
    """Serve a front end from an origin that is not the service's."""
    with front_end() as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def for_front_end(
    start: Callable[..., Service],
    database_url: str,
    origin: str,
) -> Service:
    """Run a service that the front end may call."""
    return start(DATABASE_URL=database_url, CORS_ORIGINS=origin).wait()


def test_a_front_end_of_another_origin_can_use_the_api(visit: Visit, for_front_end: Service, origin: str) -> None:
    visit.page.goto(origin)
    seen = visit.page.evaluate(FRONT_END, f"{for_front_end.url}/api/tasks")
    created = seen["created"]
    assert (created["status"], created["ETag"], created["X-Request-ID"]) == (201, '"1"', "from-a-browser")
    assert created["Location"] == f"/api/tasks/{created['body']['id']}"
    assert (seen["again"]["status"], seen["again"]["body"]) == (201, created["body"])
    assert (seen["toggled"]["ETag"], seen["toggled"]["body"]["completed"]) == ('"2"', True)
    assert [[task["title"] for task in page["body"]] for page in seen["pages"]] == [["Second"], ["First"]]
    assert (seen["patched"]["ETag"], seen["patched"]["body"]["description"]) == ('"3"', "changed")
    assert (seen["stale"]["status"], seen["stale"]["ETag"]) == (412, '"3"')
    assert (seen["deleted"]["status"], seen["gone"]["status"]) == (200, 404)


def test_a_front_end_of_an_origin_that_is_not_named_can_not(visit: Visit, for_front_end: Service, origin: str) -> None:
    visit.page.goto(origin.replace("127.0.0.1", "localhost"))  # the same server, but another origin
    with visit.page.expect_console_message(lambda message: "CORS policy" in message.text):
        refused = visit.page.evaluate("url => fetch(url).catch(error => error.name)", f"{for_front_end.url}/api/tasks")
    assert refused == "TypeError"
