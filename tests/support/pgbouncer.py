"""A PgBouncer in transaction mode, which a test may stop or kill."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from tests.support.embedded import NOBODY, as_user, owner
from tests.support.processes import free_port

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
_SETTINGS = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    "auth_type": "any",  # the [databases] line has the user and the password for the server
    "pool_mode": "transaction",
    "admin_users": "postgres",
    "default_pool_size": 4,  # fewer than the clients have, so that they share them
    "server_login_retry": 1,  # seconds; by default PgBouncer reconnects up to 15 s after the server is back
    "log_connections": 0,
    "log_disconnections": 0,
}


class PgBouncer:
    """A PgBouncer on a port of this machine, in front of all databases of one server."""

    def __init__(self, folder: Path, conninfo: str, **settings: object) -> None:
        """Start PgBouncer; ``settings`` override the default ones of this module."""
        self._folder = folder
        self._host = str(conninfo_to_dict(conninfo)["host"])
        self._port = free_port()
        server = {name: conninfo_to_dict(conninfo).get(name) for name in ("host", "port", "user", "password")}
        target = " ".join(f"{name}='{value}'" for name, value in server.items() if value)
        lines = [f"{name} = {value}" for name, value in (_SETTINGS | {"listen_port": self._port} | settings).items()]
        (folder / "pgbouncer.ini").write_text("\n".join(["[databases]", f"* = {target}", "[pgbouncer]", *lines, ""]))
        self.start()

    def start(self) -> None:
        """Start PgBouncer and wait until it accepts connections."""
        assert PROGRAM, "pgbouncer is not installed"
        # PgBouncer does not run as root, and only the server's user and root can open the socket of an embedded server.
        prefix = as_user(owner(Path(self._host)) if Path(self._host).exists() else NOBODY)
        command = [*prefix, PROGRAM, str(self._folder / "pgbouncer.ini")]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            self.console("SHOW VERSION")
        except psycopg.OperationalError:
            return False
        return True

    def console(self, command: str) -> list[TupleRow]:
        """Run a command on PgBouncer's admin console and return its rows."""
        with psycopg.connect(self.in_front_of("dbname=pgbouncer user=postgres"), autocommit=True) as db:
            cursor = db.execute(command.encode())
            return cursor.fetchall() if cursor.description else []

    def in_front_of(self, conninfo: str) -> str:
        """Return the connection string that reaches a database through PgBouncer."""
        return make_conninfo(conninfo, host="127.0.0.1", port=self._port)

    def log(self) -> str:
        """Return the log so far."""
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """Kill PgBouncer with SIGKILL."""
        self.process.kill()
        self.process.wait(timeout=120)


@contextmanager
def running(conninfo: str, **settings: object) -> Iterator[PgBouncer]:
    """Run a PgBouncer in front of a server, and kill it at the end of the block."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # PgBouncer may run as another user
        pgbouncer = PgBouncer(Path(folder), conninfo, **settings)
        try:
            yield pgbouncer
        finally:
            pgbouncer.kill()


_shared = ExitStack()


@cache
def shared(server: str) -> PgBouncer:
    """Return the PgBouncer in front of a server that all tests of this process share."""
    return _shared.enter_context(running(server))


def stop_shared() -> None:
    """Stop the shared PgBouncers."""
    _shared.close()
