"""How long a service has waited for its turn on a processor: on a busy machine no limit in seconds can be without."""

import threading
import time
from contextlib import suppress
from pathlib import Path

_INTERVAL = 0.2  # seconds


class Turns:
    """Looks at the threads of a service from its start to its end."""

    def __init__(self, pid: int) -> None:
        """Begin with the process id of the master."""
        self._pid = pid
        self._missed: list[tuple[float, float]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def missed(self, begin: float, end: float) -> float:
        """Give the seconds that a request between two moments can have waited.

        It waits with its own thread, and with any other one that has the interpreter's lock meanwhile: in each interval
        as long as the thread that waited the longest.
        """
        return sum(waited for moment, waited in list(self._missed) if begin < moment < end + _INTERVAL)

    def _watch(self) -> None:
        before: dict[str, int] = {}
        while processes := self._processes():
            now = {task: nanoseconds for process in processes for task, nanoseconds in _waited(process).items()}
            longest = max((now[task] - before.get(task, now[task]) for task in now), default=0)
            self._missed.append((time.time(), longest / 1e9))
            before = now
            time.sleep(_INTERVAL)

    def _processes(self) -> list[str]:
        with suppress(OSError):
            children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text(encoding="ascii").split()
            return [str(self._pid), *children]
        return []


def _waited(pid: str) -> dict[str, int]:
    """Give the nanoseconds that each thread of a process has waited for a processor, ready to run."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            found[str(task)] = int(task.read_text(encoding="ascii").split()[1])
    return found
