"""Counts requests, and keeps the state of pools, in memory that all processes of the service share.

Each worker writes to a block of its own, so no process waits for another one, and a killed worker leaves its figures
complete. The next worker that takes the block continues to count there, so the sums never decrease and the memory does
not grow. The memory has no name and is on no disk: nothing is left of a service that was killed.

prometheus_client's multi-process mode takes 7 times as long to count, and keeps files for each process that ever ran.

The operating system releases a file lock when its process ends. So a block is free if nobody has its lock.
"""

import fcntl
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
OTHER = "other"  # each method that HTTP does not define, and that of a request that could not be read

# The layout of the memory, in bytes.
_HEAD_SIZE = 64 * 1024
_BLOCK_SIZE = 256 * 1024  # only the pages that were written to take memory
_BLOCKS = 1024  # two services during SIGUSR2, each with up to 256 workers, and as many new ones during a reload
_SERIES_SIZE = 256  # of the figures for one method, route and status
_KEY_SIZE = _SERIES_SIZE - 8 * (len(BOUNDS) + 2)
# The first words of a block. The series begin after the space that one of them would take.
_USED, _SERIES, _SIZE, _AVAILABLE, _WAITING, _OUTAGE = range(6)
_WORD = 8
_MOST_SERIES = _BLOCK_SIZE // _SERIES_SIZE - 1
# At the beginning of the memory: a service that SIGUSR2 starts, with newer code, may inherit memory of older code.
_LAYOUT = f"todo_api metrics 1, {_BLOCK_SIZE}, {_SERIES_SIZE}, {BOUNDS}".encode()

Labels = tuple[str, str, str]  # the method, the route and the status
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
_OVERFLOW: Labels = (OTHER, OTHER, OTHER)  # of requests for which a block has no space, if there ever are any


@dataclass
class Figures:
    """The figures of all processes, including those that have ended."""

    # For each series, how many requests took how long: up to each bound but longer than the one before it, or longer
    # than all of them. The last number is how many seconds they took together.
    requests: dict[Labels, tuple[list[int], float]] = field(default_factory=dict)
    # Those of the workers that run.
    size: int = 0
    available: int = 0
    waiting: int = 0
    outage: bool = False


class _Block:
    """The block in which this process counts. The memory stays mapped, because its end would release the lock."""

    def __init__(self, descriptor: int, number: int) -> None:
        self.number = number
        self._memory = mmap.mmap(descriptor, _BLOCK_SIZE, offset=_offset(number))
        self._counts = memoryview(self._memory).cast("Q")
        self._sums = memoryview(self._memory).cast("d")
        self._lock = Lock()
        # The word with the first count of each series. The worker that had this block before has left its series.
        self._series = {labels: _first_word(index) for index, labels, _, _ in _series_in(_contents(descriptor, number))}
        self.set_gauges()
        self._counts[_USED] = 1

    def observe(self, labels: Labels, seconds: float) -> None:
        with self._lock:
            first = self._series.get(labels) or self._add(labels)
            self._counts[first + bisect_left(BOUNDS, seconds)] += 1
            self._sums[first + len(BOUNDS) + 1] += seconds

    def _add(self, labels: Labels) -> int:
        key = _key(labels)
        count = self._counts[_SERIES]
        if len(key) > _KEY_SIZE or count >= _MOST_SERIES - 1:  # the last one is for the overflow
            labels, key = _OVERFLOW, _key(_OVERFLOW)
            if labels in self._series:
                return self._series[labels]
        start = _SERIES_SIZE * (1 + count)
        self._memory[start : start + _KEY_SIZE] = key.ljust(_KEY_SIZE, b"\0")
        self._counts[_SERIES] = count + 1  # after the key, so that a reader finds complete series only
        self._series[labels] = _first_word(count)
        return self._series[labels]

    def set_gauges(self, size: int = 0, available: int = 0, waiting: int = 0, *, outage: bool = False) -> None:
        self._counts[_SIZE], self._counts[_AVAILABLE] = size, available
        self._counts[_WAITING], self._counts[_OUTAGE] = waiting, outage


class Metrics:
    """The figures that this process shares with those that it has forked, or was forked from."""

    def __init__(self) -> None:
        """Create it without memory. Until the memory is opened and a block is taken, nothing is counted."""
        self._descriptor = -1
        self._block: _Block | None = None

    def open(self, inherited: int = -1) -> int:
        """Create the memory, or use memory with an inherited file descriptor, and return its descriptor.

        Processes that are forked after that share it.

        Raises:
            OSError: the system does not allow to create it.

        """
        if _has_our_layout(inherited):
            self._descriptor = inherited
        else:
            self._descriptor = os.memfd_create("todo_api metrics")
            os.ftruncate(self._descriptor, _offset(_BLOCKS))
            os.pwrite(self._descriptor, _LAYOUT, 0)
        return self._descriptor

    def begin(self) -> bool:
        """Take a free block, in which this process counts from now on. Return whether there is one."""
        for number in range(_BLOCKS):
            if self._lock(number):
                self._block = _Block(self._descriptor, number)
                return True
        return False

    def observe(self, method: str, route: str, status: str, seconds: float) -> None:
        """Count a request, if this process counts. The number of different routes must be limited."""
        if self._block:
            self._block.observe((method if method in _METHODS else OTHER, route, status), seconds)

    def set_gauges(self, *, size: int, available: int, waiting: int, outage: bool) -> None:
        """Set the state of this process's pools, if this process counts."""
        if self._block:
            self._block.set_gauges(size, available, waiting, outage=outage)

    def read(self) -> Figures:
        """Return the figures of all processes."""
        figures = Figures()
        for data in self._blocks():
            _, _, size, available, waiting, outage = struct.unpack_from("6Q", data)
            figures.size += size
            figures.available += available
            figures.waiting += waiting
            figures.outage |= bool(outage)
            for _, labels, counts, seconds in _series_in(data):
                known, total = figures.requests.get(labels, ([0] * len(counts), 0.0))
                figures.requests[labels] = [a + b for a, b in zip(known, counts, strict=True)], total + seconds
        return figures

    def _blocks(self) -> Iterator[bytes]:
        """Yield the contents of the blocks that are or were in use. The gauges of those that are free are 0."""
        for number in range(_BLOCKS):
            start = _offset(number)
            if not any(os.pread(self._descriptor, _WORD, start)):
                return  # a process takes the first free block, so the following ones were never in use
            if (not self._block or number != self._block.number) and self._lock(number):
                os.pwrite(self._descriptor, bytes(4 * _WORD), start + _SIZE * _WORD)
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
            yield _contents(self._descriptor, number)

    def _lock(self, number: int) -> bool:
        """Try to lock a block for this process, and return whether nobody else has locked it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except BlockingIOError:
            return False
        return True


def _contents(descriptor: int, number: int) -> bytes:
    """Return the part of a block that is in use. Reading it as mapped memory would allocate the rest of it too."""
    head = os.pread(descriptor, _SERIES_SIZE, _offset(number))
    (count,) = struct.unpack_from("Q", head, _SERIES * _WORD)
    return head + os.pread(descriptor, _SERIES_SIZE * count, _offset(number) + _SERIES_SIZE)


def _series_in(data: bytes) -> Iterator[tuple[int, Labels, list[int], float]]:
    """Yield the number, the labels, the counts and the seconds of each series in a block."""
    (count,) = struct.unpack_from("Q", data, _SERIES * _WORD)
    for index in range(count):
        start = _SERIES_SIZE * (1 + index)
        key, *counts, seconds = struct.unpack_from(f"{_KEY_SIZE}s{len(BOUNDS) + 1}Qd", data, start)
        method, route, status = key.rstrip(b"\0").decode().split("\n")
        yield index, (method, route, status), counts, seconds


def _key(labels: Labels) -> bytes:
    return "\n".join(labels).encode()


def _first_word(index: int) -> int:
    return (_SERIES_SIZE * (1 + index) + _KEY_SIZE) // _WORD


def _offset(number: int) -> int:
    return _HEAD_SIZE + _BLOCK_SIZE * number


def _has_our_layout(descriptor: int) -> bool:
    try:
        return os.pread(descriptor, len(_LAYOUT) + 1, 0) == _LAYOUT + b"\0"
    except OSError:  # there is none
        return False


metrics = Metrics()  # of this process
