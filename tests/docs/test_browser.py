"""The docs page and a front end of another origin in a real browser, Chromium."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.support.fixtures import Create
from tests.support.issuer import SigningKey, running_issuer
from tests.support.optional_tools import program
from tests.support.service import Service

pytestmark = pytest.mark.usefixtures("db")  # without tasks from other tests

expect.set_options(timeout=60_000)  # milliseconds; the default of 5 s is too short on a busy machine

CALLS = ["list_tasks", "create_task", "get_task", "update_task", "delete_task", "toggle_task"]

# A front end that makes every call of the API with fetch(), and returns the parts of the responses that it can read.
FRONT_END = """async (tasks) => {
  const call = async (path, method = "GET", body = undefined, headers = {}) => {
    const type = body ? {"Content-Type": "application/json"} : {};
    const request = {method, body: JSON.stringify(body), headers: {...type, ...headers}};
    const response = await fetch(new URL(path, tasks), request);
    const seen = ["ETag", "Link", "Location", "X-Request-ID"].map(name => [name, response.headers.get(name)]);
    return {status: response.status, body: await response.json(), ...Object.fromEntries(seen)};
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
        # Playwright disables the sandbox by default, which does not start as root.
        rebinding = "--host-resolver-rules=MAP evil.example 127.0.0.1"  # as evil.example's own DNS server may do
        running = playwright.chromium.launch(executable_path=chromium, args=[rebinding])
        yield running
        running.close()


class Visit:
    """A page in the browser, with its requests and its errors."""

    def __init__(self, page: Page) -> None:
        """Record every request, and every error and warning."""
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._read)

    def _read(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.errors.append(message.text)

    def origins(self) -> set[str]:
        """Return the origins of all requests, without data: and blob: URLs, which need no server."""
        addresses = [urlsplit(url) for url in self.requests]
        return {f"{url.scheme}://{url.netloc}" for url in addresses if url.scheme not in {"data", "blob"}}


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Return a page in a new browser context, without anything stored by other tests."""
    context = browser.new_context()
    context.set_default_timeout(60_000)
    yield Visit(context.new_page())
    context.close()


@pytest.fixture
def docs(visit: Visit, service: Service) -> Visit:
    """Open the docs page and wait until it shows all calls."""
    visit.page.goto(f"{service.url}/docs")
    expect(visit.page.locator(".opblock")).to_have_count(len(CALLS))
    return visit


def execute(page: Page, call: str, *, body: str | None = None, task_id: int | None = None) -> Any:
    """Try a call out on the docs page, wait until the page shows its status, and return the status and the body."""
    block = page.locator(f"#operations-tasks-{call}")
    if "is-open" not in (block.get_attribute("class") or ""):
        block.locator(".opblock-summary-control").click()
    if body is not None:
        block.locator("textarea.body-param__text").fill(body)
    if task_id is not None:
        block.locator("tr[data-param-name=task_id] input").fill(str(task_id))
    with page.expect_response(lambda response: "/api/tasks" in response.url) as received:
        block.locator("button.execute").click()
    response = received.value
    expect(block.locator(".live-responses-table .response-col_status").last).to_contain_text(str(response.status))
    return response.status, response.json()


def test_the_docs_page_shows_every_call_and_loads_nothing_from_other_origins(docs: Visit, service: Service) -> None:
    for call in CALLS:
        block = docs.page.locator(f"#operations-tasks-{call}")
        block.locator(".opblock-summary-control").click()
        expect(block.locator(".responses-table .response").first).to_be_visible()
        expect(block.locator("button.execute")).to_be_visible()
    expect(docs.page.locator(".errors-wrapper")).to_have_count(0)
    assert docs.origins() == {service.url}
    assert docs.errors == []


def test_a_task_can_be_created_and_listed_on_the_docs_page(docs: Visit, service: Service) -> None:
    for title in ("One", "Two"):  # a value that the page fills in, such as a key, would make the second call fail
        status, task = execute(docs.page, "create_task", body=f'{{"title": "{title}"}}')
        assert (status, task["title"]) == (201, title)
    status, tasks = execute(docs.page, "list_tasks")
    assert (status, [task["title"] for task in tasks]) == (200, ["Two", "One"])
    assert docs.origins() == {service.url}
    assert docs.errors == []


def test_a_task_can_be_read_and_changed_on_the_docs_page(docs: Visit) -> None:
    _, created = execute(docs.page, "create_task")  # with the example that the page fills in
    for call in ("get_task", "toggle_task", "update_task", "delete_task"):
        status, task = execute(docs.page, call, task_id=created["id"])
        assert (status, task["id"]) == (200, created["id"]), call
    assert docs.errors == []


def authorize(page: Page, token: str) -> None:
    """Enter a token in the dialog of the Authorize button."""
    page.locator(".auth-wrapper .btn.authorize").click()
    page.locator(".modal-ux input").fill(token)
    page.locator(".modal-ux .btn.authorize").click()
    page.locator(".modal-ux .btn-done").click()
    expect(page.locator(".modal-ux")).to_have_count(0)


def test_the_docs_page_sends_the_token_of_its_authorize_button_until_it_is_closed(
    visit: Visit, start: Callable[..., Service], database_url: str
) -> None:
    key = SigningKey()
    with running_issuer(key) as issuer:
        service = start(DATABASE_URL=database_url, **issuer.settings()).wait()
        visit.page.goto(f"{service.url}/docs")
        status, problem = execute(visit.page, "list_tasks")
        assert (status, problem["type"]) == (401, "authentication_required")
        authorize(visit.page, key.token("alice"))
        status, task = execute(visit.page, "create_task", body='{"title": "Buy milk"}')
        assert (status, task["user_id"]) == (201, "alice")
        for call in ("get_task", "toggle_task", "update_task", "delete_task"):
            assert execute(visit.page, call, task_id=task["id"])[0] == 200
        visit.page.goto("about:blank")
        visit.page.goto(f"{service.url}/docs")
        assert execute(visit.page, "list_tasks")[0] == 401
    assert visit.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    assert visit.origins() == {service.url}
    assert [error for error in visit.errors if "401" not in error] == []


def test_the_docs_page_shows_the_authorize_button_if_a_token_is_optional(docs: Visit) -> None:
    authorize(docs.page, "not looked at")
    assert execute(docs.page, "list_tasks") == (200, [])


class FrontEnd(http.server.BaseHTTPRequestHandler):
    """A server of an empty page, in which a test runs its script."""

    def do_GET(self) -> None:
        """Serve the page for every path."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Front end</title><link rel=icon href=data:,>")

    def log_message(self, *_args: object) -> None:
        """Log nothing."""


@contextmanager
def front_end() -> Iterator[int]:
    """Serve a front end, and return its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FrontEnd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def origin() -> Iterator[str]:
    """Serve a front end, and return its origin, which is not the service's."""
    with front_end() as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def cors_service(
    start: Callable[..., Service],
    database_url: str,
    origin: str,
) -> Service:
    """Run a service that the front end may call."""
    return start(DATABASE_URL=database_url, CORS_ORIGINS=origin).wait()


def test_a_front_end_of_an_allowed_origin_can_use_the_api(visit: Visit, cors_service: Service, origin: str) -> None:
    visit.page.goto(origin)
    seen = visit.page.evaluate(FRONT_END, f"{cors_service.url}/api/tasks")
    created = seen["created"]
    assert (created["status"], created["ETag"], created["X-Request-ID"]) == (201, '"1"', "from-a-browser")
    assert created["Location"] == f"/api/tasks/{created['body']['id']}"
    assert (seen["again"]["status"], seen["again"]["body"]) == (201, created["body"])
    assert (seen["toggled"]["ETag"], seen["toggled"]["body"]["completed"]) == ('"2"', True)
    assert [[task["title"] for task in page["body"]] for page in seen["pages"]] == [["Second"], ["First"]]
    assert (seen["patched"]["ETag"], seen["patched"]["body"]["description"]) == ('"3"', "changed")
    assert (seen["stale"]["status"], seen["stale"]["ETag"]) == (412, '"3"')
    assert (seen["deleted"]["status"], seen["gone"]["status"]) == (200, 404)


def test_a_front_end_can_send_a_token_and_read_the_challenge(
    visit: Visit, start: Callable[..., Service], database_url: str, origin: str
) -> None:
    key = SigningKey()
    with running_issuer(key) as issuer:
        service = start(DATABASE_URL=database_url, CORS_ORIGINS=origin, **issuer.settings()).wait()
        visit.page.goto(origin)
        script = """async ([url, token]) => {
          const response = await fetch(url, {headers: token ? {Authorization: `Bearer ${token}`} : {}});
          return [response.status, response.headers.get("WWW-Authenticate")];
        }"""
        tasks = f"{service.url}/api/tasks"
        assert visit.page.evaluate(script, [tasks, key.token()]) == [200, None]
        assert visit.page.evaluate(script, [tasks, ""]) == [401, "Bearer"]
        status, challenge = visit.page.evaluate(script, [tasks, "x"])
        assert (status, challenge.partition(",")[0]) == (401, 'Bearer error="invalid_token"')


def test_a_front_end_of_an_origin_that_is_not_allowed_cannot_use_the_api(
    visit: Visit, cors_service: Service, origin: str
) -> None:
    visit.page.goto(origin.replace("127.0.0.1", "localhost"))  # the same server, but another origin
    with visit.page.expect_console_message(lambda message: "CORS policy" in message.text):
        rejected = visit.page.evaluate("url => fetch(url).catch(error => error.name)", f"{cors_service.url}/api/tasks")
    assert rejected == "TypeError"


# Everything that a page can send without being allowed to. No promise here says whether the request was refused.
ATTACK = """async (task) => {
  const send = init => fetch(task + "/toggle", {method: "POST", ...init}).catch(() => {});
  await send({mode: "no-cors"});
  await send({mode: "no-cors", credentials: "include", referrerPolicy: "no-referrer"});
  await send({mode: "no-cors", body: new URLSearchParams({title: "x"})});
  await send({});
  await fetch(task, {method: "DELETE"}).catch(() => {});
  navigator.sendBeacon(task + "/toggle", "x");
}"""
FORM = """task => {
  const form = document.createElement("form");
  Object.assign(form, {method: "POST", action: task + "/toggle"});
  document.body.append(form);
  form.submit();
}"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.example"])
def test_a_page_of_another_origin_changes_nothing(
    visit: Visit, service: Service, origin: str, create: Create, host: str
) -> None:
    path = f"/api/tasks/{create()['id']}"
    visit.page.goto(origin.replace("127.0.0.1", host))
    visit.page.evaluate(ATTACK, service.url + path)
    with visit.page.expect_navigation() as navigation:
        visit.page.evaluate(FORM, service.url + path)
    assert (navigation.value.status, navigation.value.url) == (403, f"{service.url}{path}/toggle")
    assert len([url for url in visit.requests if url.endswith("/toggle")]) == 6
    assert service.client.get(path).json()["version"] == 1


def test_a_page_whose_name_leads_to_this_machine_reads_and_changes_nothing(
    visit: Visit, service: Service, create: Create
) -> None:
    task, url = create("a very private title"), f"http://evil.example:{service.port}"
    response = visit.page.goto(f"{url}/api/tasks")  # now the page has the origin of the service
    assert response
    assert (response.status, response.json()["type"]) == (421, "misdirected_request")
    call = "async ([path, method]) => { const r = await fetch(path, {method}); return [r.status, await r.text()] }"
    for path, method in (("", "GET"), (f"/{task['id']}", "GET"), (f"/{task['id']}/toggle", "POST")):
        status, text = visit.page.evaluate(call, [f"/api/tasks{path}", method])
        assert (status, "private" in text) == (421, False)
    assert service.client.get(f"/api/tasks/{task['id']}").json() == task
