"""The lock files in DATA_DIR.

``start.lock``: one process at a time starts or stops the server. ``users.lock``: each process that uses the server
shares it. ``server.lock``: the server itself holds it, because each of its processes inherits the open file. The kernel
releases it when the last of these processes ends. So "held" means that the server is alive, even if it runs in another
container, where its processes cannot be seen.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from todo_api.config import StartError
from todo_api.embedded import socket_folder

_SERVER = "server.lock"


def take(path: Path, kind: int) -> int:
    """Open and lock a file, and return the file descriptor, which keeps the lock until it is closed.

    Raises:
        BlockingIOError: another process holds the lock, and ``kind`` has LOCK_NB.
        StartError: the file system has no locks.

    """
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()  # if it is new
        raise StartError(
            f"DATA_DIR {path.parent} is on a file system without file locks ({error.strerror}). Without locks, two "
            "servers could use one cluster: set DATA_DIR to a folder on another file system, or set DATABASE_URL"
        ) from error
    return descriptor


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a lock file without locking it, and yield the file descriptor."""
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class ServerLock:
    """An open ``server.lock``, to see whether the server lives. It works even after the folder was moved or deleted."""

    def __init__(self, data_dir: Path) -> None:
        """Open the file."""
        self.descriptor = _open(data_dir / _SERVER)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def is_of(self, data_dir: Path) -> bool:
        """Return whether the folder still is the one in which this file was opened, or cannot be entered."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), (data_dir / _SERVER).stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def is_held(self) -> bool:
        """Return whether a process of the server is alive."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        return False

    def postmaster(self) -> psutil.Process | None:
        """Return the server's first process, if it is alive and can be seen from here."""
        recorded = os.pread(self.descriptor, 1000, 0).decode(errors="replace")
        pid = recorded.partition(" ")[0]
        if not pid.isdecimal() or recorded != _identity(int(pid)) or not self.is_held():
            return None
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.status() != psutil.STATUS_ZOMBIE:  # in a container there may be no parent that reaps it
                return process
        return None


@contextmanager
def server_lock(data_dir: Path) -> Iterator[ServerLock]:
    """Open ``server.lock`` for the time of a block."""
    lock = ServerLock(data_dir)
    try:
        yield lock
    finally:
        lock.close()


def _open(path: Path) -> int:
    with suppress(FileExistsError):
        return create(path)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def create(path: Path) -> int:
    """Create a file, and return its file descriptor. If root does it, it belongs to the owner of the folder.

    That user may run the service later. The user may also have put a link there, which root must not follow.

    Raises:
        FileExistsError: there is a file, or a link.

    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    if socket_folder.is_root():
        owner = path.parent.stat()
        with suppress(OSError):  # some file systems have no owners
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
    return descriptor


def record(descriptor: int, pid: int) -> None:
    """Record the server's first process in ``server.lock``."""
    os.pwrite(descriptor, _identity(pid).encode(), 0)


def _identity(pid: int) -> str:
    """Return the identity of a process: its id, its start (in clock ticks) and the namespace of its id.

    All users can read these. To read the working directory of another user's process, root needs a capability that it
    lacks in a container.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return f"{pid} {stat.rpartition(')')[2].split()[19]} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
