"""The compared applications, each with two workers on the same database."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
from psycopg.conninfo import conninfo_to_dict

from tests.support.databases import as_url
from tests.support.environment import ROOT, environment
from tests.support.processes import children, free_port

WORKERS = 2
THREADS = 4

COMMANDS = {
    "service": [sys.executable, "wsgi.py"],
    # The same settings as the service's gunicorn, as far as they affect the figures.
    "bare": [
        *[sys.executable, "-m", "gunicorn", "--no-control-socket", "--log-level=warning", "--keep-alive=75"],
        *["--worker-class=gthread", f"--workers={WORKERS}", f"--threads={THREADS}", "tests.benchmarks.bare:app"],
        "--reuse-port",  # otherwise one of the workers often gets all connections
    ],
    "FastAPI": [
        *[sys.executable, "-m", "uvicorn", "--log-level=warning", "--no-access-log"],
        *[f"--workers={WORKERS}", "tests.benchmarks.sqlmodel_app:app"],
    ],
}


class Candidate:
    """A running application."""

    def __init__(self, name: str, conninfo: str, log: Path, **more_settings: object) -> None:
        """Start it and wait for its first response. Without ``conninfo``, it starts an embedded PostgreSQL."""
        self.name = name
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = {"bare": [f"--bind=127.0.0.1:{port}"], "FastAPI": [f"--port={port}"]}.get(name, [])
        settings: dict[str, object] = {"PORT": port, "WEB_CONCURRENCY": WORKERS, "WEB_THREADS": THREADS}
        settings |= more_settings
        if conninfo:
            settings |= {"DATABASE_URL": as_url(conninfo), "SQLALCHEMY_URL": sqlalchemy_url(conninfo)}
        else:
            settings |= {"DATA_DIR": log.with_suffix("")}
        started = time.monotonic()
        with log.open("wb") as output:
            self.process = psutil.Popen(
                [*COMMANDS[name], *arguments], cwd=ROOT, env=environment(**settings), stdout=output, stderr=output
            )
        while not self._answers():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < started + 60, log.read_text()
            time.sleep(0.01)
        self.start_seconds = time.monotonic() - started

    def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            return not httpx.get(f"{self.url}/api/tasks?limit=1").is_server_error  # a 401 is a response too
        return False

    def processes(self) -> list[psutil.Process]:
        """Return the master and its workers, without the processes of an embedded PostgreSQL."""
        started = children(self.process.pid, recursive=True)
        return [psutil.Process(self.process.pid), *(child for child, name in started.items() if name != "postgres")]

    def memory(self) -> float:
        """Return the memory of the processes in MiB. Shared memory counts once (PSS)."""
        return sum(process.memory_full_info().pss for process in self.processes()) / 2**20

    def cpu_seconds(self) -> float:
        """Return the processor time of its running processes, in seconds."""
        return cpu_seconds(self.processes())

    def settle(self) -> None:
        """Wait until the application is idle. It may still process requests whose clients have disconnected."""
        deadline = time.monotonic() + 60
        before = -1.0
        while (now := self.cpu_seconds()) > before + 0.02 and time.monotonic() < deadline:
            before = now
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop the application."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=120)


def sqlalchemy_url(conninfo: str) -> str:
    """Return a connection string as a URL for SQLAlchemy's asyncpg dialect."""
    parts = {name: quote(str(value)) for name, value in conninfo_to_dict(conninfo).items()}
    return "postgresql+asyncpg://{user}@/{dbname}?host={host}&port={port}".format(**parts)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return the processor time that processes have used, in seconds."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)
