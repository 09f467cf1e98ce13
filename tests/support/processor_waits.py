"""How long the threads of a service have waited for a processor. The time limits of the tests exclude these waits."""

import threading
import time
from contextlib import suppress
from pathlib import Path

_INTERVAL = 0.2  # seconds


class ProcessorWaits:
    """Records how long the threads of a service wait for a processor, from its start to its end."""

    def __init__(self, pid: int) -> None:
        """Start to record. ``pid`` is the process id of the master."""
        self._pid = pid
        self._waits: list[tuple[float, float]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def between(self, begin: float, end: float) -> float:
        """Return the seconds for which a request between two moments may have waited for a processor.

        A request waits if its own thread waits, or another thread that holds the interpreter's lock. So the longest
        wait of any thread counts for each interval.
        """
        return sum(waited for moment, waited in list(self._waits) if begin < moment < end + _INTERVAL)

    def _watch(self) -> None:
        before: dict[str, int] = {}
        while processes := self._processes():
            now = {task: nanoseconds for process in processes for task, nanoseconds in _waited(process).items()}
            longest = max((now[task] - before.get(task, now[task]) for task in now), default=0)
            self._waits.append((time.time(), longest / 1e9))
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
    with suppress(OSError):  # the process has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # the thread has ended
                found[str(task)] = int((task / "schedstat").read_text(encoding="ascii").split()[1])
    return found
