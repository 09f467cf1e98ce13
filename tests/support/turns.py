"""How long the threads of a service have waited for a processor. On a busy machine, limits in seconds exclude this."""

import threading
import time
from contextlib import suppress
from pathlib import Path

_INTERVAL = 0.2  # seconds


class Turns:
    """A watch over the threads of a service, from its start to its end."""

    def __init__(self, pid: int) -> None:
        """Start the watch. ``pid`` is the process id of the master."""
        self._pid = pid
        self._missed: list[tuple[float, float]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def missed(self, begin: float, end: float) -> float:
        """Return the seconds that a request between two moments may have waited for a processor.

        Its own thread waits, or another thread that holds the interpreter's lock. So the longest wait of any thread
        counts for each interval.
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
    """Return the nanoseconds for which each thread of a process was ready to run and waited for a processor."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            found[str(task)] = int(task.read_text(encoding="ascii").split()[1])
    return found
