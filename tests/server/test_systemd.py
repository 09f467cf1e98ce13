"""The units in .deploy, which a real systemd runs: the service, and the socket that systemd can open for it."""

import re
from collections.abc import Iterator

import httpx
import pytest

from tests.docs.test_readme import SYSTEMD, SYSTEMD_SOCKET, copy_project
from tests.support.environment import ROOT
from tests.support.load import Load
from tests.support.processes import free_port, wait_until
from tests.support.systemd import Machine

HIGHEST_EXPOSURE = 3  # of 10, as systemd-analyze rates a unit
UNIT = "/etc/systemd/system/todo_api.service"
SOCKET = "/etc/systemd/system/todo_api.socket"
LOG = "/var/lib/todo_api.log"
ENDED = "database system is shut down"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Boot a machine, and install the service on it as the README says, but with a free port."""
    folder = tmp_path_factory.mktemp("machine").resolve()
    folder.chmod(0o755)
    copy_project(folder / "project")
    booted = Machine(folder, free_port())
    try:
        booted.run(f"echo PORT={booted.port} > /etc/todo_api.env")
        # There is no journal, so systemd would throw the log away. The Python was installed in another folder.
        ours = f"[Service]\\nStandardError=append:{LOG}\\nEnvironment=LD_LIBRARY_PATH=/opt/python/lib\\n"
        booted.run(f"mkdir {UNIT}.d && printf '{ours}' > {UNIT}.d/tests.conf")
        booted.run(SYSTEMD)
        yield booted
    finally:
        booted.power_off()


@pytest.fixture
def client(machine: Machine) -> Iterator[httpx.Client]:
    """Start the service with nothing but its unit, and return a client. After the test, stop the service."""
    machine.run("systemctl start todo_api")
    with httpx.Client(base_url=machine.url, timeout=60) as client:
        wait_until(lambda: is_ready(machine))
        yield client
    machine.run("systemctl stop todo_api")


def is_ready(machine: Machine) -> bool:
    """Return whether the service can reach its database."""
    try:
        return httpx.get(f"{machine.url}/readyz", timeout=60).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def create(client: httpx.Client) -> str:
    """Create a task and return its path."""
    response = client.post("/api/tasks", json={"title": "Buy milk"})
    assert response.status_code == httpx.codes.CREATED, response.text
    return str(response.headers["Location"])


def statuses(machine: Machine, field: str) -> list[str]:
    """Return a line of /proc/PID/status for each process of the service, PostgreSQL's included."""
    group = machine.property("ControlGroup")
    processes = f"$(cat /sys/fs/cgroup{group}/cgroup.procs)"
    # A process of PostgreSQL may end meanwhile.
    found = machine.run(f"for pid in {processes}; do grep -s {field}: /proc/$pid/status || true; done")
    return found.splitlines()


def test_systemd_finds_nothing_in_the_units(machine: Machine) -> None:
    assert machine.run(f"systemd-analyze verify {UNIT} .deploy/todo_api.socket 2>&1") == ""


def test_the_unit_is_hardened(machine: Machine) -> None:
    machine.run(f"systemd-analyze security --offline=true --threshold={10 * HIGHEST_EXPOSURE - 1} {UNIT}")


def test_the_processes_have_no_privileges(machine: Machine, client: httpx.Client) -> None:
    create(client)
    user = machine.run("id -u todo_api").strip()
    assert {line.split()[1] for line in statuses(machine, "Uid")} == {user}
    assert {line.split()[1] for line in statuses(machine, "NoNewPrivs")} == {"1"}
    assert {line.split()[1] for line in statuses(machine, "Seccomp")} == {"2"}
    assert {int(line.split()[1], 16) for line in statuses(machine, "CapBnd")} == {0}
    assert len(statuses(machine, "Uid")) > 3


def test_tasks_survive_a_restart_and_a_stop_ends_everything(machine: Machine, client: httpx.Client) -> None:
    path = create(client)
    machine.run("systemctl restart todo_api")
    wait_until(lambda: is_ready(machine))
    assert client.get(path).status_code == httpx.codes.OK
    group = machine.property("ControlGroup")
    machine.run("systemctl stop todo_api")
    assert machine.property("Result") == "success"
    assert machine.property("ExecMainStatus") == "0"
    assert machine.fails(f"test -s /sys/fs/cgroup{group}/cgroup.procs")
    assert ENDED in machine.run("tail -n 1 /var/lib/todo_api/postgres.log")


def test_a_killed_service_is_restarted_with_its_tasks(machine: Machine, client: httpx.Client) -> None:
    path = create(client)
    restarts = int(machine.property("NRestarts"))
    machine.run("systemctl kill --signal=SIGKILL todo_api")
    wait_until(lambda: int(machine.property("NRestarts")) > restarts and is_ready(machine))
    assert client.get(path).status_code == httpx.codes.OK


def test_a_reload_replaces_the_workers(machine: Machine, client: httpx.Client) -> None:
    def workers() -> set[str]:
        return set(machine.run(f"cat /proc/{master}/task/{master}/children").split())

    master = machine.property("MainPID")
    before = workers()
    machine.run("systemctl reload todo_api")
    wait_until(lambda: len(workers() - before) >= len(before) - 1 and len(workers()) == len(before))
    assert client.get("/readyz").status_code == httpx.codes.OK
    assert machine.property("MainPID") == master


def test_a_wrong_setting_ends_the_start_once_with_one_line(machine: Machine) -> None:
    machine.run("systemctl stop todo_api")
    machine.run(f"printf 'WEB_THREADS=many\\nPORT={machine.port}\\n' > /etc/todo_api.env; : > {LOG}")
    assert machine.fails("systemctl start todo_api")
    machine.run(f"echo PORT={machine.port} > /etc/todo_api.env")
    assert machine.property("ExecMainStatus") == "3"
    assert machine.property("ActiveState") == "failed"  # and not about to start again
    [line] = machine.run(f"cat {LOG}").splitlines()
    assert "WEB_THREADS" in line
    machine.run("systemctl reset-failed todo_api")


def test_systemd_waits_longer_than_a_stop_takes() -> None:
    def seconds(file: str, name: str) -> int:
        [found] = re.findall(rf"(?m)^{name} ?= ?(\d+)\b", (ROOT / file).read_text(encoding="utf-8"))
        return int(found)

    requests = seconds("todo_api/server/gunicorn_conf.py", "graceful_timeout")
    postgres = seconds("todo_api/embedded/cluster.py", "_STOP_TIMEOUT")
    unit = ROOT / ".deploy" / "todo_api.service"
    [rest] = re.findall(r"DRAIN_SECONDS, if they are at most (\d+)", unit.read_text(encoding="utf-8"))
    assert requests + postgres + int(rest) <= seconds(".deploy/todo_api.service", "TimeoutStopSec")


def test_no_connection_is_refused_while_the_service_behind_a_socket_restarts(machine: Machine) -> None:
    port = f"[Socket]\\nListenStream=\\nListenStream=127.0.0.1:{machine.port}\\n"
    machine.run(f"mkdir {SOCKET}.d && printf '{port}' > {SOCKET}.d/port.conf")
    machine.run("systemctl stop todo_api")
    machine.run(SYSTEMD_SOCKET)
    assert machine.property("ActiveState") == "active"
    with Load(machine, 8) as load:
        wait_until(lambda: load.statuses()[201] > 100)
        for _ in range(2):
            machine.run("systemctl restart todo_api")
    machine.run("systemctl stop todo_api.socket todo_api")
    assert [call for call in load.calls if call.status != httpx.codes.CREATED] == []


def test_the_first_connection_to_the_socket_starts_the_service(machine: Machine) -> None:
    machine.run("systemctl stop todo_api && systemctl start todo_api.socket")
    assert machine.property("ActiveState") == "inactive"
    with httpx.Client(base_url=machine.url, timeout=60) as client:
        create(client)
    assert machine.property("ActiveState") == "active"
    machine.run("systemctl stop todo_api.socket todo_api")
