"""Chooses the folder of the embedded PostgreSQL's socket. Only the server's user and root can enter that folder."""

import os
import stat
import tempfile
from pathlib import Path

PORT = "5432"  # only a part of the socket's name: the server listens on no network address
SOCKET = f".s.PGSQL.{PORT}"
_LONGEST_PATH = 103  # bytes; macOS allows 104 with the final NUL, Linux 108
_PREFIX = "todo_api-"


def choose(cluster: Path) -> Path:
    """Return the cluster's own folder, or a private temporary folder if the path is not usable for a socket."""
    # The path of a socket has a limited length. In a connection string, a comma separates two hosts.
    if len(os.fsencode(cluster / SOCKET)) <= _LONGEST_PATH and "," not in str(cluster):
        return cluster
    # A server that was killed leaves its temporary folder behind. That folder is reused.
    if (left := recorded(cluster)) and is_private(left, cluster):
        return left
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
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


def is_root() -> bool:
    """Return whether this process runs as root."""
    return os.geteuid() == 0
