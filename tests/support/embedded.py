"""What the tests of the embedded PostgreSQL share."""

import re
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.support.capabilities import ROOT, root_lacks
from tests.support.environment import environment
from tests.support.processes import wait_until
from tests.support.service import Service
from todo_api.embedded import programs

BIN = programs.find(None).folder
NOBODY = 65534
UNKNOWN = 4711  # a user id without an entry in /etc/passwd

# Precedes the commands that root must run as another user. The capability lets that user read closed folders, in which
# the interpreter or the tests' folder may be. It does not let the user write there. Root in a container cannot pass it
# on, and there the folders have to be open.
_READ_ALL = [] if root_lacks("dac_read_search") else ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
AS_USER = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *_READ_ALL] if ROOT else []


def as_user(user: int) -> list[str]:
    """Return a prefix that runs a command as another user, who can read closed folders."""
    return [part.replace(str(NOBODY), str(user)) for part in AS_USER]


def copy(source: Path, target: Path) -> Path:
    """Copy a folder with the owners and modes of its files, and return the path of the copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def create_task(service: Service) -> int:
    """Create a task and return its id."""
    response = service.client.post("/api/tasks", json={"title": "Buy milk"})
    assert response.status_code == 201, response.text
    task_id: int = response.json()["id"]
    return task_id


def has_task(service: Service, task_id: int) -> bool:
    """Return whether the service has a task with this id."""
    return service.answers(f"/api/tasks/{task_id}")


def stop_all(services: Iterable[Service]) -> list[int]:
    """Stop services at the same time and return their exit statuses."""
    for service in services:
        service.process.terminate()
    return [service.stop() for service in services]


def psql_line(service: Service) -> str:
    """Return the psql line that the service logs at each start, from the last start in the log."""
    lines: list[str] = re.findall(r"to use PostgreSQL with psql: (.*)", service.log())
    return lines[-1]


def socket_folder(service: Service) -> Path:
    """Return the socket folder that the psql line names."""
    match = re.search(r"host=(\S+)", psql_line(service))
    assert match
    return Path(match[1])


def query(service: Service, sql: str) -> str:
    """Run a query with the psql line, pasted into a shell, and return its output."""
    command = f"{psql_line(service)} -X -A -t -c '{sql}'"
    result = subprocess.run(["sh", "-c", command], env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def launch_by_hand(cluster: Path, sockets: Path, folder: Path = BIN) -> subprocess.Popen[bytes]:
    """Start the server of a cluster without the service, with the programs in a folder, and wait for its socket."""
    command: list[str | Path] = [*as_user(owner(cluster)), folder / "postgres", "-D", cluster, "-h", "", "-k", sockets]
    server = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL)
    wait_until((sockets / ".s.PGSQL.5432").exists)
    return server


def owner(path: Path) -> int:
    """Return the id of the user who owns a file."""
    return path.lstat().st_uid


def permissions(path: Path) -> int:
    """Return the permission bits of a file."""
    return stat.S_IMODE(path.lstat().st_mode)


def assert_failed_with_one_line(service: Service, *parts: str) -> None:
    """Check that a failed start logs one line with these parts, and no traceback."""
    lines = [line for line in service.log().splitlines() if line.startswith("todo_api: ")]
    assert len(lines) == 1, service.log()
    assert [part for part in parts if part not in lines[0]] == []
    assert "Traceback" not in service.log()
