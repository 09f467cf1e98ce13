"""A running service."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.environment import ROOT, environment
from tests.support.processes import START_TIMEOUT, children, free_port
from tests.support.processor_waits import ProcessorWaits


class Service:
    """A running ``python wsgi.py``, or another command that serves the application on PORT."""

    def __init__(self, log: Path, command: list[str] | None = None, **options: Any) -> None:
        """Start the service; ``options`` are its settings, and ``cwd`` and ``prefix`` of the process."""
        self.log_file = log
        cwd = options.pop("cwd", ROOT)
        prefix = options.pop("prefix", [])
        self.port = options["PORT"] = options.get("PORT") or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, *(command or [sys.executable, "wsgi.py"])],
                cwd=cwd,
                env=environment(**options),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.processor_waits = ProcessorWaits(self.process.pid)
        self.client = httpx.Client(base_url=self.url, timeout=60, verify=False)

    def log(self) -> str:
        """Return the log so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def took(self, status: int) -> list[float]:
        """Return the seconds that each response of a status took, as logged, without the waits for a processor."""
        return [self.processed(begin, end) for begin, end in self.periods(str(status))]

    def periods(self, status: str = r"\d+") -> list[tuple[float, float]]:
        """Return when each request whose response has a status began and ended, as logged, as times of time.time()."""
        found = []
        for moment, milliseconds in re.findall(rf"(?m)^(\S+ \S+) .* {status} ([\d.]+)ms ", self.log()):
            end = datetime.strptime(moment, "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()
            found.append((end - float(milliseconds) / 1000, end))
        return found

    def processed(self, begin: float, end: float) -> float:
        """Return the seconds between two moments, without the waits for a processor."""
        return max(0, end - begin - self.processor_waits.between(begin, end))

    def answers(self, path: str = "/readyz") -> bool:
        """Return whether the service responds to a GET with 200."""
        try:
            return self.client.get(path).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def serves(self) -> bool:
        """Return whether this service responds, and not the workers of a killed master that still have the port."""
        return "serving http" in self.log() and self.answers()

    def wait(self) -> "Service":
        """Wait until the service can reach its database, and return the service."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers():
            assert self.process.poll() is None, f"the service ended:\n{self.log()}"
            assert time.monotonic() < deadline, f"the service did not get ready:\n{self.log()}"
            time.sleep(0.02)
        return self

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send a signal to the master, wait for its end and return its exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout=120)

    def stop_repeatedly(self, *numbers: int) -> int:
        """Send signals to the master again and again until it has ended, and return its exit status."""
        self.client.close()
        deadline = time.monotonic() + 120
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "timed out"
            for number in numbers:
                self.process.send_signal(number)
            time.sleep(0.003)
        return self.process.wait()

    def kill(self) -> None:
        """Kill the process group with SIGKILL: the master and its workers."""
        self.client.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=120)


def workers(service: Service) -> list[psutil.Process]:
    """Return the workers: the master's children with the name of the master. PostgreSQL has another name."""
    pid = service.process.pid
    return [child for child, name in children(pid).items() if name == psutil.Process(pid).name()]
