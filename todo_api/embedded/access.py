"""Writes pg_hba.conf, which has the roles that may log in to the embedded PostgreSQL.

The kernel has checked the user of each client before PostgreSQL does: only the server's user and root can enter the
folder of the socket and open the socket. So these roles need no password. PostgreSQL's method ``peer`` would check the
same user again, but fails for a user id without an entry in /etc/passwd.
"""

import os
from pathlib import Path

from todo_api.embedded import socket_folder

_HEAD = """\
# The service writes this file, and no other role can log in. Only the user of the server and root can open its socket.
# If this file had other rules before, they are in pg_hba.conf.before.
"""


def allow(cluster: Path, *roles: str) -> None:
    """Let only these roles log in, from the server's next start or reload on."""
    file = _file_of(cluster)
    fresh = file.with_name("pg_hba.conf.new")
    fresh.unlink(missing_ok=True)  # of a start that was killed
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as opened:
        os.fchmod(opened.fileno(), 0o600)  # whatever the umask is
        if socket_folder.is_root():
            owner = cluster.stat()
            os.fchown(opened.fileno(), owner.st_uid, owner.st_gid)
        opened.write(_rules(roles))
        opened.flush()
        os.fsync(opened.fileno())
    if (text := _text_of(file)) and not text.startswith(_HEAD.encode()):
        file.replace(file.with_name("pg_hba.conf.before"))
    fresh.replace(file)


def is_allowed_only(cluster: Path, *roles: str) -> bool:
    """Return whether the file lets only these roles log in. The server may not have read it yet."""
    return _text_of(_file_of(cluster)) == _rules(roles)


def _rules(roles: tuple[str, ...]) -> bytes:
    return "".join([_HEAD, *(f"local all {role} trust\n" for role in roles)]).encode()


def _file_of(cluster: Path) -> Path:
    return cluster / "pg_hba.conf"


def _text_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
