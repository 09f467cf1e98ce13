"""The folder of the embedded PostgreSQL's socket, which only the server's user and root can enter."""

import os
import stat
import tempfile
from pathlib import Path

PORT = "5432"  # part of the socket's name only: the server listens on no network address
SOCKET = f".s.PGSQL.{PORT}"
_LONGEST_PATH = 103  # bytes; macOS allows 104 with the closing NUL, Linux 108
_PREFIX = "todo_api-"


def choose(cluster: Path) -> Path:
    """Return the cluster's own folder or, if a socket cannot have its path, a private temporary folder."""
    if len(os.fsencode(cluster / SOCKET)) <= _LONGEST_PATH and "," not in str(cluster):
        return cluster  # for libpq, a comma separates two hosts
    if (left := recorded(cluster)) and is_private(left, cluster):
        return left  # by a server that was killed
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    if is_root():
        owner = cluster.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
    return folder


def recorded(cluster: Path) -> Path | None:
    """Return the socket folder that postmaster.pid names in its fifth line, which is empty until the socket exists."""
    try:
        lines = os.fsdecode((cluster / "postmaster.pid").read_bytes()).split("\n")
    except OSError:
        return None
    return Path(lines[4]) if lines[4:] and lines[4].startswith("/") else None


def is_private(folder: Path, cluster: Path) -> bool:
    """Return whether ``choose`` made the folder for this cluster. The content of postmaster.pid proves nothing."""
    try:
        found, owner = folder.lstat(), cluster.stat()
    except OSError:
        return False
    return (
        folder.name.startswith(_PREFIX)
        and found.st_mode == stat.S_IFDIR | stat.S_IRWXU
        and found.st_uid == owner.st_uid
    )


def is_root() -> bool:
    """Return whether this process runs as root, so that it can give files to the server's user."""
    return os.geteuid() == 0
