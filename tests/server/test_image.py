"""The image of .deploy/Dockerfile, built and run as the README says, with what Docker withholds withheld."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.docs.test_readme import (
    CONTAINER,
    IMAGE,
    MOVE,
    READMES,
    REPLACE_CONTAINERS,
    SETTINGS_FILE,
    START_CONTAINERS,
    UPSTREAM,
    listed_by_git,
)
from tests.support.embedded import create_task, has_task
from tests.support.engine import Engine
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.load import Load, assert_acknowledged_once
from tests.support.nginx import INSTANCE, start_nginx
from tests.support.postgres import Postgres
from tests.support.processes import free_port, wait_until
from tests.support.replica import Server
from tests.support.service import Service

pytestmark = pytest.mark.long

DEPLOY = READMES[".deploy/README.md"]
FIRST_OF_POSTGRESQL = "head -n 1 /data/postgres/postmaster.pid"  # its process id


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Run an engine with the two images that the README builds: todo_api, and todo_api:small for hosted databases."""
    running = Engine(tmp_path_factory.mktemp("engine").resolve())
    running.run(IMAGE.replace(" todo_api ", " todo_api:small "))
    running.run(CONTAINER.splitlines()[0])
    yield running
    running.remove()


@pytest.fixture
def port(engine: Engine) -> Iterator[int]:
    """Return a free port. After the test, remove all containers and volumes."""
    yield free_port()
    engine.call("podman rm --all --force --time 0; podman volume rm --all --force")


class Container:
    """The container that the README starts, on another port."""

    def __init__(self, engine: Engine, port: int) -> None:
        """Start the container."""
        self.engine = engine
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)
        engine.run(CONTAINER.partition("\n")[2].replace("127.0.0.1:8000:", f"127.0.0.1:{port}:"))

    def is_ready(self) -> bool:
        """Return whether the service can reach its database."""
        try:
            return self.client.get("/readyz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def wait(self) -> None:
        """Wait until the service can reach its database. If that takes too long, show the container."""
        try:
            wait_until(self.is_ready)
        except AssertionError as error:
            found = self.engine.call("docker inspect --format '{{json .State}}' todo_api; docker logs todo_api")
            error.add_note(found.stdout + found.stderr)
            raise

    def create(self) -> str:
        """Create a task when the service is ready, and return its path."""
        self.wait()
        response = self.client.post("/api/tasks", json={"title": "Buy milk"})
        assert response.status_code == httpx.codes.CREATED, response.text
        return str(response.headers["Location"])

    def has(self, path: str) -> bool:
        """Return whether there is a task, when the service is ready."""
        self.wait()
        return self.client.get(path).status_code == httpx.codes.OK

    def inside(self, script: str) -> str:
        """Run a script in the container, and return its output."""
        return self.engine.run(f"docker exec todo_api sh -ec {script!r}")


@pytest.fixture
def container(engine: Engine, port: int) -> Container:
    """Start the container of the README."""
    return Container(engine, port)


@pytest.fixture(params=["todo_api", "todo_api:small"])
def files(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return the folder with the files of an image."""
    yield Path(engine.run(f"podman image mount {request.param}"))
    engine.run(f"podman image unmount {request.param}")


def test_the_image_has_the_service_and_its_packages_and_nothing_else(files: Path) -> None:
    service = files / "opt" / "todo_api"
    found = {str(path.relative_to(service)) for path in service.rglob("*") if path.is_file()}
    needed = {name for name in listed_by_git() if name.startswith(("sql/", "todo_api/"))}
    assert {name for name in found if "__pycache__" not in name} == needed | {"requirements.txt", "wsgi.py"}
    assert {path.name for path in (files / "opt").iterdir()} == {"todo_api", "venv"}
    packages = {path.name for path in files.glob("opt/venv/lib/python3*/site-packages/*")}
    assert packages & {"pip", "setuptools", "pytest", "ruff"} == set()
    assert {"flask", "gunicorn", "psycopg"} <= packages
    programs = {
        path.name
        for folder in ("bin", "usr/bin", "usr/local/bin", "opt/venv/bin")
        for path in (files / folder).iterdir()
    }
    assert programs & {"gcc", "cc", "g++", "make", "ld", "as", "pip", "pytest"} == set()


def test_the_images_are_as_small_as_the_readme_says(engine: Engine) -> None:
    [(small, large)] = re.findall(r"(\d+) MB instead of (\d+) MB larger", DEPLOY)

    def size(image: str) -> int:
        return int(engine.run(f"podman image inspect --format '{{{{.Size}}}}' {image}")) // 1_000_000

    base = size("python:3.11-slim-bookworm")
    assert size("todo_api:small") - base <= int(small)
    assert size("todo_api") - base <= int(large)


def test_the_service_has_only_what_it_needs(container: Container) -> None:
    container.create()
    status = dict(re.findall(r"(\w+):\s+(\S+)", container.inside("cat /proc/1/status")))
    assert (status["Uid"], status["Gid"]) == ("10001", "10001")
    assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [0] * 5
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    mounts = container.inside("cat /proc/mounts").splitlines()
    [root] = [line.split() for line in mounts if line.split()[1] == "/"]
    assert "ro" in root[3].split(",")
    for path in ("/", "/opt/todo_api", "/opt/venv", "/etc", "/var", "/run"):
        assert container.inside(f"if touch {path}/x 2>/dev/null; then echo writable; fi") == "", path


def test_tasks_survive_a_restart_a_kill_and_a_new_container(container: Container, engine: Engine, port: int) -> None:
    paths = [container.create()]
    engine.run("docker restart todo_api")
    paths.append(container.create())
    # The kill returns before the container has ended, and the start of a container that runs for podman does nothing.
    # podman removes the container's network in the background. A start before that gives the container no network.
    engine.run("docker kill --signal KILL todo_api")
    wait_until(lambda: engine.run("docker inspect --format '{{.State.Running}}' todo_api") == "false")
    engine.run("podman container cleanup todo_api && docker start todo_api")
    paths.append(container.create())
    engine.run("docker stop todo_api && docker rm todo_api")
    new = Container(engine, port)
    assert [new.has(path) for path in paths] == [True, True, True]


def test_a_stop_exits_with_0_and_shuts_postgresql_down(container: Container, engine: Engine) -> None:
    container.create()
    began = time.monotonic()
    engine.run("docker stop todo_api")
    assert time.monotonic() - began < 30
    assert engine.run("docker inspect --format '{{.State.ExitCode}}' todo_api") == "0"
    data = Path(engine.run("podman volume inspect --format '{{.Mountpoint}}' todo_api"))
    assert "database system is shut down" in (data / "postgres.log").read_text(encoding="utf-8").splitlines()[-1]
    assert not (data / "postgres" / "postmaster.pid").exists()


def test_process_1_reaps_the_processes_of_a_killed_postgresql(container: Container) -> None:
    path = container.create()
    postmaster = container.inside(FIRST_OF_POSTGRESQL)
    container.inside(f"kill -s KILL {postmaster}")
    wait_until(lambda: container.is_ready() and container.inside(FIRST_OF_POSTGRESQL) != postmaster)
    assert container.has(path)
    states = container.inside("cat /proc/[0-9]*/stat 2>/dev/null || true")
    assert re.findall(r"(?m)^\d+ \(.*\) Z ", states) == []


def test_the_health_check_tells_whether_the_service_responds(container: Container, engine: Engine) -> None:
    container.create()
    engine.run("podman healthcheck run todo_api")
    container.inside("kill -s STOP $(cat /proc/1/task/1/children)")
    assert engine.call("podman healthcheck run todo_api").returncode == 1
    container.inside("kill -s CONT $(cat /proc/1/task/1/children)")
    engine.run("podman healthcheck run todo_api")


@pytest.mark.parametrize("setting", ["PORT=9000", "SCRIPT_NAME=/todo", "HOST=::", "PORT="])
def test_the_health_check_heeds_the_settings(engine: Engine, port: int, setting: str) -> None:
    engine.run(f"docker run -d --name todo_api -e ALLOW_ANONYMOUS=true -e {setting} todo_api")
    wait_until(lambda: not engine.call("podman healthcheck run todo_api").returncode)


def test_without_tokens_the_start_ends_with_one_line(engine: Engine, port: int) -> None:
    done = engine.call(f"docker run --rm -p 127.0.0.1:{port}:8000 todo_api")
    assert done.returncode == 3
    assert "set AUTH_JWKS, or ALLOW_ANONYMOUS=true" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_image_for_hosted_databases_says_what_it_needs(engine: Engine, port: int) -> None:
    done = engine.call("docker run --rm -e ALLOW_ANONYMOUS=true todo_api:small")
    assert done.returncode == 3
    assert "DATABASE_URL" in done.stderr
    assert done.stderr.count("\n") == 1


def test_psql_and_the_commands_work_in_the_container(container: Container) -> None:
    container.create()
    assert container.inside("flask psql -X -At -c 'SELECT count(*) FROM tasks'") == "1"


def postgres_on_tcp(folder: Path) -> Server:
    """Run a PostgreSQL that listens on a port of this machine, as a hosted one does."""
    first = Postgres(folder / "hosted")
    command = first.process.args
    assert isinstance(command, list)
    first.stop()
    server = Server(first.cluster, command)
    server.start()
    return server


def two_ports() -> str:
    """Return the beginning of ports that are free, and differ in their last digit: 1 or 2."""
    while not ((first := free_port()) % 10 == 1 and free_port() == first + 1):
        pass
    return str(first // 10)


def test_two_containers_behind_nginx_serve_a_hosted_postgresql_and_are_replaced_without_an_outage(
    engine: Engine, port: int, start: Start, tmp_path: Path
) -> None:
    database = postgres_on_tcp(tmp_path)
    url = f"postgresql://postgres@127.0.0.1:{database.port}/postgres"
    laptop = start(DATA_DIR=tmp_path / "laptop").wait()
    task = create_task(laptop)
    move = re.sub("'postgresql:.*'", url, MOVE).replace(
        ".venv/bin/flask", f"'{sys.executable}' -m flask --app '{ROOT}/wsgi'"
    )
    settings = environment(DATA_DIR=tmp_path / "laptop")
    subprocess.run(["sh", "-ec", move], cwd=tmp_path, env=settings, check=True)
    given = re.sub("(?m)^AUTH_.*\n", "", SETTINGS_FILE)
    (tmp_path / "todo_api.env").write_text(re.sub("(?m)^(DATABASE_URL)=.*", rf"\1={url}", given), encoding="utf-8")
    ports, metrics = two_ports(), two_ports()

    def with_our_ports(script: str) -> str:
        named = script.replace(" todo_api\n}", " todo_api:small\n}")
        return (
            named.replace("PORT=800$", f"PORT={ports}$")
            .replace("PORT=910$", f"PORT={metrics}$")
            .replace(":800$", f":{ports}$")
        )

    engine.run(with_our_ports(START_CONTAINERS), tmp_path)
    containers = [Service(tmp_path / "unused", ["true"], PORT=int(f"{ports}{number}")) for number in (1, 2)]
    wait_until(lambda: all(has_task(container, task) for container in containers))
    assert [line.strip() for line in UPSTREAM.splitlines()] == [INSTANCE.replace("8000", f"800{n}") for n in (1, 2)]
    nginx = start_nginx(start, tmp_path, *containers)
    before = engine.run("docker ps --quiet").split()
    with Load(nginx, 10) as load:
        wait_until(lambda: load.statuses()[201] > 200)
        replace = START_CONTAINERS.partition("start 1\n")[0] + REPLACE_CONTAINERS
        engine.run(with_our_ports(replace), tmp_path)
        moment = time.monotonic()
        wait_until(lambda: load.statuses(moment)[201] > 100)
    after = engine.run("docker ps --quiet").split()
    assert len(after) == 2
    assert set(before) & set(after) == set()
    for number in (1, 2):
        engine.run(f"podman healthcheck run todo_api_{number}")
        assert "POST /api/tasks" in engine.call(f"docker logs todo_api_{number}").stderr
        figures = httpx.get(f"http://127.0.0.1:{metrics}{number}/metrics").text
        assert 'todo_api_http_requests_total{method="POST",route="/api/tasks",status="201"}' in figures
    assert set(load.statuses()) == {httpx.codes.CREATED}
    database.execute("DELETE FROM tasks WHERE title = 'Buy milk'")  # it was not sent here
    assert_acknowledged_once(load.calls, database.conninfo)
    engine.run("docker stop todo_api_1 todo_api_2")
