"""Chooses the folder of the embedded PostgreSQL's socket. Only the server's user and root can enter that folder."""

import os
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from todo_api.config import StartError

PORT = "5432"  # only a part of the socket's name: the server listens on no network address
SOCKET = f".s.PGSQL.{PORT}"
_LONGEST_PATH = 103  # bytes; macOS allows 104 with the final NUL, Linux 108
_PREFIX = "todo_api-"


def choose(cluster: Path) -> Path:
    """Return the cluster's own folder or, if it cannot hold the socket, a private temporary folder.

    Raises:
        StartError: there is no temporary folder for a socket.

    """
    # In a connection string, a comma separates two hosts.
    if _has_short_path(cluster) and "," not in str(cluster) and _can_hold_socket(cluster):
        return cluster
    # A server that was killed leaves its temporary folder behind. That folder is reused.
    if (left := recorded(cluster)) and is_private(left, cluster):
        return left
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    if not _has_short_path(folder) or not _can_hold_socket(folder):
        folder.rmdir()
        raise StartError(
            f"PostgreSQL's socket can be neither in {cluster} nor in the temporary folder {folder.parent}: set TMPDIR "
            "to a folder with a short path"
        )
    if is_root():
        owner = cluster.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
    return folder


def recorded(cluster: Path) -> Path | None:
    """Return the socket folder that postmaster.pid names, or None if it names none."""
    try:
        lines = os.fsdecode((cluster / "postmaster.pid").read_bytes()).split("\n")
    except OSError:
        return None
    # The fifth line is empty until the socket exists.
    return Path(lines[4]) if lines[4:] and lines[4].startswith("/") else None


def is_private(folder: Path, cluster: Path) -> bool:
    """Return whether a folder has the prefix, the mode and the owner of the folders that ``choose`` creates.

    This check is needed because postmaster.pid may name any folder. It does not prove that ``choose`` created the
    folder for this cluster.
    """
    try:
        found, owner = folder.lstat(), cluster.stat()
    except OSError:
        return False
    return (
        folder.name.startswith(_PREFIX)
        and found.st_mode == stat.S_IFDIR | stat.S_IRWXU
        and found.st_uid == owner.st_uid
    )


def remove(folder: Path, cluster: Path) -> None:
    """Remove a private folder, unless there is still a socket in it."""
    if is_private(folder, cluster):
        with suppress(OSError):
            folder.rmdir()


def is_root() -> bool:
    """Return whether this process runs as root."""
    return os.geteuid() == 0


def _has_short_path(folder: Path) -> bool:
    return len(os.fsencode(folder / SOCKET)) <= _LONGEST_PATH


def _can_hold_socket(folder: Path) -> bool:
    """Return whether a socket can be created in a folder. Some network and user-space file systems have none."""
    probe = folder / ".probe"
    try:
        probe.unlink(missing_ok=True)  # of a start that was killed
        with socket.socket(socket.AF_UNIX) as tried:
            tried.bind(str(probe))
        probe.unlink()
    except OSError:
        return False
    return True
