"""METRICS_PORT: what it counts, who is answered, and that nothing is lost when processes are replaced."""

import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support.databases import as_url
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.load import Crowd, Load
from tests.support.optional_tools import program
from tests.support.postgres import Postgres
from tests.support.problems import assert_problem
from tests.support.processes import children, free_port, has_ended, wait_until
from tests.support.scrapes import DURATIONS, REQUESTS, Samples, requests, scrape, url_of, value
from tests.support.service import Service, workers
from todo_api import config

Begin = Callable[..., tuple[Service, str]]
TASK, TASKS = "/api/tasks/{task_id}", "/api/tasks"
GAUGES = ("todo_api_pool_size", "todo_api_pool_available", "todo_api_pool_waiting", "todo_api_database_outage")


@pytest.fixture
def begin(start: Start, database_url: str) -> Begin:
    """Return a function that starts a service with METRICS_PORT. It returns the service and the URL of its metrics."""

    def begin(**options: Any) -> tuple[Service, str]:
        settings = {"DATABASE_URL": database_url, "WEB_CONCURRENCY": 1, "METRICS_PORT": free_port(), **options}
        service = start(**settings).wait()
        wait_until(lambda: len(workers(service)) == settings["WEB_CONCURRENCY"])
        return service, url_of(service, settings["METRICS_PORT"])

    return begin


def raw(service: Service, request: bytes) -> bytes:
    """Send bytes over a new connection and return all bytes that come back."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_requests_are_counted_by_method_route_and_status(begin: Begin) -> None:
    service, url = begin()
    before = requests(scrape(url))
    assert set(before) <= {("GET", "/readyz", 200), ("GET", "/readyz", 503)}
    client = service.client
    task = client.post("/api/tasks", json={"title": "Buy milk"}).headers["Location"]
    assert client.get(task, headers={"If-None-Match": '"1"'}).status_code == 304
    for path in (task, "/api/tasks?q=secret", "/docs", "/docs/page.js", "/docs/swagger-ui.css", "/openapi.json"):
        assert client.get(path).status_code == 200
    for path in (
        "/nope",
        "/metrics",
        "/api/tasks/0",
        "/api/tasks/99999999999999999999",
        "/api//tasks",
        f"/{'x' * 500}",
    ):
        assert client.get(path).status_code == 404
    client.get(f"{task}1")  # another task
    client.head(task)
    client.options(task)
    client.post(f"{task}/toggle")
    client.patch(task, json={"title": ""})
    client.put(task)
    client.request("BREW", task)
    client.delete(task, headers={"Origin": "https://evil.example"})
    client.delete(task, headers={"If-Match": '"1"'})
    client.delete(task, headers={"Host": "evil.example"})
    client.post("/api/tasks", content=b"x" * 70_000, headers={"Content-Type": "application/json"})
    assert raw(service, b"GARBAGE\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert raw(service, b"GET /docs HTTP/1.1\r\nExpect: x\r\n\r\n").startswith(b"HTTP/1.1 417")
    samples = scrape(url)
    assert requests(samples) - before == Counter(
        {
            ("POST", TASKS, 201): 1,
            ("GET", TASK, 304): 1,
            ("GET", TASK, 200): 1,
            ("GET", TASK, 404): 1,
            ("GET", TASKS, 200): 1,
            ("GET", "/docs", 200): 1,
            ("GET", "/docs/page.js", 200): 1,
            ("GET", "/docs/{name}", 200): 1,
            ("GET", "/openapi.json", 200): 1,
            ("GET", "unknown", 404): 6,
            ("HEAD", TASK, 200): 1,
            ("OPTIONS", TASK, 200): 1,
            ("POST", f"{TASK}/toggle", 200): 1,
            ("PATCH", TASK, 400): 1,
            ("PUT", "unknown", 405): 1,
            ("other", "unknown", 405): 1,
            ("DELETE", TASK, 403): 1,
            ("DELETE", TASK, 412): 1,
            ("DELETE", TASK, 421): 1,
            ("POST", TASKS, 413): 1,
            ("other", "unknown", 400): 1,
            ("other", "unknown", 417): 1,
        }
    )
    for (name, labels), count in samples.items():  # the histogram has the same requests
        if name == REQUESTS:
            assert samples[f"{DURATIONS}_count", labels] == count
            assert samples[f"{DURATIONS}_bucket", labels | {("le", "+Inf")}] == count
            assert 0 <= samples[f"{DURATIONS}_sum", labels] < 60 * count
    assert value(samples, "todo_api_info", version=config.VERSION) == 1
    assert "secret" not in httpx.get(url).text
    assert service.stop() == 0


def test_durations_are_in_the_buckets_where_they_belong(begin: Begin, conninfo: str) -> None:
    service, url = begin()
    with psycopg.connect(conninfo) as db:
        db.execute("LOCK tasks")
        assert service.client.get("/api/tasks").status_code == 503  # after about half a second
    samples = scrape(url)
    found = {
        dict(labels)["le"]: count
        for (name, labels), count in samples.items()
        if name == f"{DURATIONS}_bucket" and ("status", "503") in labels and ("route", TASKS) in labels
    }
    bounds = sorted(found, key=float)
    assert " ".join(bounds) == "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 +Inf"
    assert [found[bound] for bound in bounds] == sorted(found.values())
    assert (found["0.25"], found["+Inf"]) == (0, 1)
    assert 0.25 < value(samples, f"{DURATIONS}_sum", status="503", route=TASKS) < 60


def are_replaced(before: list[psutil.Process], service: Service) -> bool:
    """Return whether these workers have ended, and the service has two others."""
    return not set(before) & set(workers(service)) and len(workers(service)) == 2


def never_less(before: Samples, after: Samples) -> bool:
    """Return whether no counter has decreased or is missing."""
    counters = [key for key in before if key[0].startswith("todo_api_http")]
    return all(after.get(key, -1) >= before[key] for key in counters)


def test_counters_are_exact_over_reloads_and_a_second_service_and_never_decrease(begin: Begin) -> None:
    service, url = begin(WEB_CONCURRENCY=2)
    scrapes, old = [scrape(url)], service.process
    before = requests(scrapes[0])
    is_over = threading.Event()

    def scrape_on() -> None:
        while not is_over.wait(0.02):
            scrapes.append(scrape(url))

    with ThreadPoolExecutor(1) as thread, Crowd(service, 8, ("get", "create")) as crowd:
        scraping = thread.submit(scrape_on)
        for _ in range(2):
            replaced = workers(service)
            old.send_signal(signal.SIGHUP)
            wait_until(partial(are_replaced, replaced, service))
        old.send_signal(signal.SIGUSR2)
        wait_until(lambda: service.log().count("serving ") == 2)
        [new] = [child for child in workers(service) if children(child.pid)]
        wait_until(lambda: value(scrape(url), GAUGES[0]) == 16)  # two services with two workers, each with four threads
        old.terminate()
        wait_until(lambda: old.poll() is not None)
        wait_until(lambda: value(scrape(url), GAUGES[0]) == 8)
        is_over.set()
        scraping.result()
    try:
        after = scrape(url)
        assert len(scrapes) > 10
        assert all(map(never_less, scrapes, [*scrapes[1:], after]))
        assert set(crowd.outcomes()) == {"answered"}
        counted = requests(after) - before
        created = sum(exchange.kind == "create" for exchange in crowd.exchanges) + 1  # the Crowd's own task
        got = sum(exchange.kind == "get" for exchange in crowd.exchanges)
        assert counted == {("POST", TASKS, 201): created, ("GET", TASK, 200): got}
    finally:
        new.terminate()
        wait_until(lambda: has_ended(new))


def test_killed_workers_leave_their_counts_but_no_gauges_and_no_memory_grows(begin: Begin) -> None:
    service, url = begin(WEB_CONCURRENCY=2)
    counted = 0.0
    for _ in range(4):
        for _ in range(20):
            assert httpx.get(f"{service.url}/docs").status_code == 200  # on both workers
        counted += 20
        assert value(scrape(url), REQUESTS, route="/docs") == counted
        for worker in workers(service):
            worker.kill()
            wait_until(partial(are_replaced, [worker], service))
    wait_until(lambda: value(scrape(url), GAUGES[0]) == 8)
    wait_until(lambda: value(scrape(url), GAUGES[1]) == 8)
    service.process.send_signal(signal.SIGTTOU)  # one worker less
    wait_until(lambda: value(scrape(url), GAUGES[0]) == 4, timeout=60)
    assert value(scrape(url), REQUESTS, route="/docs") == counted
    assert 0 < memory_of(service) < 60_000


def memory_of(service: Service) -> int:
    """Return how many bytes the shared memory of a service takes."""
    for descriptor in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            if "memfd:todo_api" in str(descriptor.readlink()):
                return descriptor.stat().st_blocks * 512
    raise AssertionError


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_port_is_at_host_and_nowhere_else(host: str, begin: Begin) -> None:
    service, url = begin(**({"HOST": host} if host != "::1" else {"HOST": host, "command": ON_BOTH}))
    port = int(url.split(":")[2].split("/")[0])
    here, elsewhere = ("::1", "127.0.0.1") if host == "::1" else ("127.0.0.1", "127.0.0.2")
    with httpx.Client() as client:
        assert client.get(f"http://{f'[{here}]' if ':' in here else here}:{port}/metrics").status_code == 200
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((elsewhere, port), timeout=60)
    assert_problem(service.client.get("/metrics"), 404, "not_found")


# The tests' client expects a service at 127.0.0.1.
ON_BOTH = ["sh", "-c", f'exec "{sys.executable}" wsgi.py --bind "[::1]:$PORT" --bind "127.0.0.1:$PORT"']


def test_only_get_and_head_of_metrics_are_answered(begin: Begin) -> None:
    _, url = begin()
    root = url.removesuffix("/metrics")
    got, head = httpx.get(f"{url}?x=1"), httpx.head(url)
    assert (head.status_code, head.content, head.headers["Content-Type"]) == (200, b"", got.headers["Content-Type"])
    for path in ("/", "/metrics/", "/api/tasks", "/healthz"):
        assert_problem(httpx.get(root + path), 404, "not_found")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        refused = httpx.request(method, url)
        assert_problem(refused, 405, "method_not_allowed")
        assert refused.headers["Allow"] == "GET, HEAD"
    port = int(root.rpartition(":")[2])
    for sent, status in (
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"\x16\x03\x01\r\n\r\n", b"400"),
        (b"GET /metrics\r\n\r\n", b"400"),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(sent)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 " + status)


def test_silent_slow_and_many_clients_delay_neither_scrapes_nor_requests(begin: Begin) -> None:
    service, url = begin()
    port = int(url.split(":")[2].split("/")[0])
    clients = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(120)]
    assert scrape(url)
    for number, client in enumerate(clients):
        # Some send nothing, some a part of a request, some too much, and some do not read the response.
        client.sendall((b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")[number % 3])
    for _ in range(20):
        assert scrape(url)
        assert service.answers()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client, pytest.raises(ConnectionError):
        client.sendall(b"A" * 2**26)
    for client in clients:  # none is kept for long
        with client, suppress(ConnectionResetError):
            while client.recv(65_536):
                pass
    assert "Traceback" not in service.log()
    assert service.stop() == 0


SLOW_INSERTS = """
    CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(4); RETURN NEW; END';
    CREATE TRIGGER sleep BEFORE INSERT ON tasks EXECUTE FUNCTION sleep();
"""


def test_a_scrape_in_progress_is_answered_by_a_worker_that_is_replaced(begin: Begin) -> None:
    service, url = begin(WEB_CONCURRENCY=1)
    [replaced] = workers(service)
    port = httpx.URL(url).port or 0

    def states() -> set[str]:
        """Return the states of the worker's sockets of METRICS_PORT."""
        with suppress(psutil.NoSuchProcess):
            return {found.status for found in replaced.net_connections() if found.laddr.port == port}
        return set()

    with socket.create_connection(("127.0.0.1", port), timeout=60) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.1\r\n")
        wait_until(lambda: "ESTABLISHED" in states())
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "LISTEN" not in states())
        scraper.sendall(b"Host: localhost\r\n\r\n")
        assert scraper.recv(65_536).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_scrape_does_not_wait_for_the_threads_of_requests(begin: Begin, postgres: Postgres) -> None:
    service, url = begin(DATABASE_URL=as_url(postgres.conninfo), WEB_THREADS=1)
    with psycopg.connect(postgres.conninfo, autocommit=True) as db, ThreadPoolExecutor(1) as thread:
        db.execute(SLOW_INSERTS)
        slow = thread.submit(service.client.post, "/api/tasks", json={"title": "Buy milk"})
        wait_until(lambda: value(scrape(url), GAUGES[1]) == 0)  # the only connection is in use
        assert value(scrape(url), GAUGES[0]) in {1, 2}  # a second one asks the server about the slow statement
        assert not slow.done()
        assert slow.result().status_code == 201


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    """Run a PostgreSQL that the test may stop."""
    running = Postgres(tmp_path / "server")
    yield running
    running.stop()


def test_an_outage_is_seen_and_its_end_too_even_without_requests(begin: Begin, postgres: Postgres) -> None:
    service, url = begin(DATABASE_URL=as_url(postgres.conninfo))
    wait_until(lambda: value(scrape(url), GAUGES[0]) == 4)
    assert value(scrape(url), GAUGES[3]) == 0
    postgres.kill()
    wait_until(lambda: service.client.get("/readyz").status_code == 503)
    wait_until(lambda: value(scrape(url), GAUGES[3]) == 1)
    postgres.start()
    wait_until(lambda: value(scrape(url), GAUGES[3]) == 0)
    wait_until(lambda: value(scrape(url), GAUGES[1]) == 4)


def test_requests_that_wait_for_a_connection_are_seen(begin: Begin, postgres: Postgres) -> None:
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute("CREATE ROLE two LOGIN CREATEROLE CONNECTION LIMIT 2")
        db.execute("CREATE DATABASE two OWNER two")
    two = make_conninfo(postgres.conninfo, user="two", dbname="two")
    service, url = begin(DATABASE_URL=as_url(two), DATABASE_ROLE="of_two")
    with psycopg.connect(make_conninfo(two, user="postgres")) as db:
        db.execute("LOCK tasks")
        with Load(service, 8):
            wait_until(lambda: value(scrape(url), GAUGES[2]) > 0)
    assert value(scrape(url), GAUGES[0]) == 2
    wait_until(lambda: value(scrape(url), GAUGES[2]) == 0)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], r"cannot listen on 127.0.0.1, port {taken} \(HOST and METRICS_PORT\): Address already in use.*"),
        (["--bind", "127.0.0.1:{taken}"], "METRICS_PORT and the port of --bind must be different ports"),
    ],
    ids=["in use", "of --bind"],
)
def test_a_port_that_cannot_be_had_stops_the_start_with_one_line(
    options: list[str], line: str, tmp_path: Path, start: Start
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = free_port() if options else other.getsockname()[1]
        command = [sys.executable, "wsgi.py", *(option.format(taken=taken) for option in options)]
        service = start(command=command, METRICS_PORT=taken, DATA_DIR=tmp_path / "data")
        assert service.process.wait(timeout=120) == 3
    assert re.fullmatch(f"todo_api: {line.format(taken=taken)}\n", service.log())
    assert not (tmp_path / "data").exists()


def test_the_port_must_not_be_that_of_the_service(tmp_path: Path, start: Start) -> None:
    port = free_port()
    service = start(PORT=port, METRICS_PORT=port, DATA_DIR=tmp_path / "data")
    assert service.process.wait(timeout=120) == 3
    assert service.log() == "todo_api: METRICS_PORT and PORT must be different ports\n"


def test_a_killed_service_leaves_the_port_free_for_the_next_one(begin: Begin) -> None:
    service, url = begin(WEB_CONCURRENCY=2)
    service.stop(signal.SIGKILL)  # the workers keep the port until they notice
    again, _ = begin(METRICS_PORT=int(url.split(":")[2].split("/")[0]), WEB_CONCURRENCY=2)
    assert value(scrape(url), "todo_api_info", version=config.VERSION) == 1
    assert again.stop() == 0


@pytest.mark.parametrize("port", ["", "9101"])
def test_prometheus_client_is_imported_only_if_it_is_needed(port: str) -> None:
    script = (
        "import sys; from todo_api.server import gunicorn_conf; import wsgi; print('prometheus_client' in sys.modules)"
    )
    variables = environment(METRICS_PORT=port, DATABASE_URL="postgresql://127.0.0.1:1/none")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"  # the master imports it when it opens the port


OWN_SETTINGS = "threads = 2\n"
IMPORT_OURS = "from todo_api.server.gunicorn_conf import *\n"


@pytest.mark.parametrize("beginning", [IMPORT_OURS, ""], ids=["with ours", "without ours"])
def test_settings_of_ones_own_begin_with_ours_or_a_log_line_says_what_is_ignored(
    beginning: str, begin: Begin, tmp_path: Path
) -> None:
    assert IMPORT_OURS.strip() in (ROOT / ".deploy" / "README.md").read_text(encoding="utf-8")
    port = free_port()
    (tmp_path / "own.py").write_text(f'{beginning}{OWN_SETTINGS}bind = "127.0.0.1:{port}"\n')
    command = [sys.executable, "-m", "gunicorn", "-c", str(tmp_path / "own.py"), "wsgi:app"]
    service, url = begin(command=command, PORT=port)
    ignored = "METRICS_PORT and DRAIN_SECONDS are ignored: they need the hooks of todo_api.server.gunicorn_conf"
    assert service.log().count(ignored) == (0 if beginning else 1)
    if beginning:
        assert service.client.get("/docs").status_code == 200
        assert value(scrape(url), REQUESTS, route="/docs") == 1
        assert value(scrape(url), GAUGES[0]) == 2
    else:
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    assert service.stop() == 0


def test_gunicorns_own_worker_counts_too(begin: Begin) -> None:
    service, url = begin(command=[sys.executable, "wsgi.py", "--worker-class", "gthread", "--preload"])
    assert service.client.get("/docs").status_code == 200
    assert value(scrape(url), REQUESTS, route="/docs") == 1
    assert service.stop() == 0


def deployed(folder: Path, url: str) -> Path:
    """Copy the configuration of Prometheus, change the lines marked with "yours", and return its path."""
    text = (ROOT / ".deploy" / "prometheus.yml").read_text(encoding="utf-8")
    assert text.count('"127.0.0.1:9101"') == 1
    target = url.removeprefix("http://").removesuffix("/metrics")
    text = text.replace('"127.0.0.1:9101"', f'"{target}"').replace("15s", "1s")
    (folder / "alerts.yml").write_bytes((ROOT / ".deploy" / "alerts.yml").read_bytes())
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    return folder / "prometheus.yml"


def promtool(*arguments: str, given: str = "") -> str:
    """Run promtool, which must succeed, and return what it prints. ``given`` is its standard input."""
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_scrapes_the_service_and_evaluates_the_rules(begin: Begin, tmp_path: Path, start: Start) -> None:
    service, url = begin(WEB_CONCURRENCY=2)
    port = free_port()
    options = [f"--config.file={deployed(tmp_path, url)}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    address = f"--web.listen-address=127.0.0.1:{port}"
    prometheus = start(command=[program("prometheus"), *options, address], PORT=port)
    wait_until(lambda: prometheus.answers("/-/ready"))

    def found(query: str) -> list[dict[str, Any]]:
        data = prometheus.client.get("/api/v1/query", params={"query": query}).json()["data"]
        results: list[dict[str, Any]] = data["result"]
        return results

    wait_until(lambda: [result["value"][1] for result in found('up{job="todo_api"}')] == ["1"])
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == 201
    wait_until(lambda: bool(found(f'{REQUESTS}{{method="POST", route="{TASKS}", status="201"}} >= 1')))
    assert found("todo_api_info")[0]["metric"]["version"] == config.VERSION
    assert found("todo_api_pool_size")[0]["value"][1] == "8"

    def rules() -> list[dict[str, Any]]:
        [group] = prometheus.client.get("/api/v1/rules").json()["data"]["groups"]
        found: list[dict[str, Any]] = group["rules"]
        return found

    wait_until(lambda: {rule["health"] for rule in rules()} == {"ok"})
    assert {rule["state"] for rule in rules()} == {"inactive"}
    assert prometheus.stop() == 0


def test_promtool_finds_nothing_in_the_metrics_the_configuration_and_the_rules(begin: Begin, tmp_path: Path) -> None:
    service, url = begin()
    for path in ("/api/tasks", "/nope", "/docs"):
        service.client.get(path)
    assert promtool("check", "metrics", given=httpx.get(url).text) == ""
    assert "SUCCESS" in promtool("check", "config", str(deployed(tmp_path, url)))


def test_each_alert_fires_for_its_situation_and_not_for_others() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(ROOT / "tests" / "server" / "alerts.yml"))
