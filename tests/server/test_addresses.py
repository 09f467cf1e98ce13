"""The addresses on which the service listens: without tokens or ALLOW_ANONYMOUS, only its own machine reaches it."""

import socket
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.environment import ROOT
from tests.support.fixtures import Start
from tests.support.optional_tools import missing
from tests.support.problems import assert_problem
from tests.support.processes import free_port

START = [sys.executable, "wsgi.py"]
# A small program that starts the service with a socket that listens already: as systemd does, or for --bind fd://3.
INHERIT = """
import os, socket, sys
host, port, *command = sys.argv[1:]
listener = socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
if "fd://3" not in command:
    os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(command[0], command)
"""


def own_address() -> str:
    """Return an address of this machine that other machines can reach.

    A client on this machine that connects to it has the same address.
    """
    found = [address for listed in psutil.net_if_addrs().values() for address in listed]
    addresses = [address.address for address in found if address.family == socket.AF_INET]
    return next((address for address in addresses if not address.startswith("127.")), "") or missing("no network")


@pytest.mark.parametrize(
    ("settings", "arguments", "named"),
    [
        ({"HOST": "0.0.0.0"}, [], "0.0.0.0"),
        ({"HOST": "::"}, [], "::"),
        ({"HOST": "192.168.1.5"}, [], "192.168.1.5"),
        ({"HOST": "0.0.0.0", "TRUSTED_HOSTS": "todo.example.com", "ALLOW_ANONYMOUS": "false"}, [], "0.0.0.0"),
        ({}, ["--bind", "0.0.0.0:{port}"], "0.0.0.0"),
        ({}, ["--bind", "[::]:{port}"], "::"),
        ({}, ["--bind", ":{port}"], "all addresses"),
        ({}, ["--bind", "todo.example.com:{port}"], "todo.example.com"),
        ({}, ["--bind", "127.0.0.1:{port}", "--bind", "unix:socket", "--bind", "0.0.0.0:{port}"], "0.0.0.0"),
        ({"GUNICORN_CMD_ARGS": "--bind=0.0.0.0:{port}"}, [], "0.0.0.0"),
    ],
    ids=str,
)
def test_an_address_that_others_can_reach_stops_the_start_with_one_line(
    settings: dict[str, str], arguments: list[str], named: str, tmp_path: Path, start: Start
) -> None:
    port, data_dir = free_port(), tmp_path / "data"
    command = [*START, *(argument.format(port=port) for argument in arguments)]
    filled = {name: value.format(port=port) for name, value in settings.items()}
    service = start(command=command, PORT=port, DATA_DIR=data_dir, **filled)
    assert_stopped(service.process.wait(timeout=180), service.log(), named)
    assert not data_dir.exists()


@pytest.mark.parametrize("arguments", [[], ["--bind", "fd://3"]], ids=["systemd", "fd"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_inherited_socket_that_others_can_reach_stops_the_start_with_one_line(
    host: str, arguments: list[str], tmp_path: Path, start: Start
) -> None:
    port, data_dir = free_port(), tmp_path / "data"
    command = [sys.executable, "-c", INHERIT, host, str(port), *START, *arguments]
    service = start(command=command, PORT=port, DATA_DIR=data_dir)
    assert_stopped(service.process.wait(timeout=180), service.log(), host)
    assert not data_dir.exists()


def assert_stopped(status: int, log: str, named: str) -> None:
    """Check that the start has ended with one line that names the address and the remedies."""
    assert (status, log.count("\n")) == (3, 1), log
    assert f"not on {named} (HOST, --bind" in log
    assert "set AUTH_JWKS, or ALLOW_ANONYMOUS=true" in log


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost"])
def test_the_service_listens_on_loopback_addresses(host: str, database_url: str, start: Start) -> None:
    service = start(DATABASE_URL=database_url, HOST=host)
    service.client.base_url = httpx.URL(
        f"http://[{host}]:{service.port}" if ":" in host else f"http://{host}:{service.port}"
    )
    assert service.wait().client.get("/api/tasks").status_code == 200


def test_with_allow_anonymous_others_can_reach_the_service(database_url: str, start: Start) -> None:
    settings = {"DATABASE_URL": database_url, "HOST": "0.0.0.0", "ALLOW_ANONYMOUS": "true"}
    service, trusting = start(**settings).wait(), start(**settings, TRUSTED_HOSTS="todo.example.com").wait()
    url = f"http://{own_address()}:{{}}/api/tasks"
    assert httpx.get(url.format(service.port)).status_code == 200
    assert_problem(httpx.get(url.format(trusting.port)), 421, "misdirected_request")
    assert httpx.get(url.format(trusting.port), headers={"Host": "todo.example.com"}).status_code == 200


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "gunicorn", "--bind", "0.0.0.0:{port}", "wsgi:app"],
        ["-m", "flask", "--app", "wsgi", "run", "--host", "0.0.0.0", "--port", "{port}"],
    ],
    ids=["gunicorn", "flask run"],
)
def test_another_server_on_all_addresses_serves_its_own_machine_only(
    command: list[str], database_url: str, start: Start
) -> None:
    port = free_port()
    arguments = [argument.format(port=port) for argument in command]
    service = start(command=[sys.executable, *arguments], cwd=ROOT, PORT=port, DATABASE_URL=database_url).wait()
    assert service.client.get("/api/tasks").status_code == 200
    for headers in ({}, {"Host": "localhost"}, {"Host": f"127.0.0.1:{port}", "X-Forwarded-For": "127.0.0.1"}):
        response = httpx.get(f"http://{own_address()}:{port}/api/tasks", headers=headers)
        assert_problem(response, 421, "misdirected_request")
    assert httpx.get(f"http://{own_address()}:{port}/healthz").status_code == 200
