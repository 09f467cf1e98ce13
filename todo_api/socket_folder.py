"""Where the embedded PostgreSQL has its socket: a folder that only the server's own user and root can enter."""

import os
import stat
import tempfile
from pathlib import Path

PORT = "5432"  # only part of the socket's name: the server listens on no network address
SOCKET = f".s.PGSQL.{PORT}"
_PATH_LIMIT = 103  # bytes; macOS takes 104 with the closing NUL, Linux 108
_PREFIX = "todo_api-"


def choose(cluster: Path) -> Path:
    """Find a private folder for the socket: the cluster's own, unless its path can't be that of a socket."""
    if len(os.fsencode(cluster / SOCKET)) <= _PATH_LIMIT and "," not in str(cluster):
        return cluster  # libpq takes a comma for the end of a host
    if (left := recorded(cluster)) and is_private(left, cluster):
        return left  # a killed server's
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    if is_root():
        owner = cluster.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
    return folder


def recorded(cluster: Path) -> Path | None:
    """Read where a server has or had its socket: the fifth line of postmaster.pid, empty until the socket is there."""
    try:
        lines = os.fsdecode((cluster / "postmaster.pid").read_bytes()).split("\n")
    except OSError:
        return None
    return Path(lines[4]) if lines[4:] and lines[4].startswith("/") else None


def is_private(folder: Path, cluster: Path) -> bool:
    """Say whether this module made the folder for the cluster's socket; anybody may write what postmaster.pid says."""
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
    """Say whether this process may give files to the server's user."""
    return os.geteuid() == 0
