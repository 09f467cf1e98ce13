"""A PgBouncer in transaction mode, which a test may harm."""

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

from tests.support.processes import free_port

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
_NOBODY = 65534
# As cluster does for PostgreSQL: both refuse to be root, and the folders of root's tests are closed to others.
_UNPRIVILEGED = [
    *("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
_SETTINGS = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    "auth_type": "any",  # who asks is no matter: the databases' line says who it is for the server
    "pool_mode": "transaction",
    "admin_users": "postgres",
    "default_pool_size": 4,  # few, so that the connections to the server really are shared
    "server_login_retry": 1,  # seconds; by default PgBouncer leaves a server that is back alone for up to 15 s
    "log_connections": 0,
    "log_disconnections": 0,
}


class PgBouncer:
    """A PgBouncer on a port of this machine, in front of all databases of one server."""

    def __init__(self, folder: Path, conninfo: str, **settings: object) -> None:
        """Start it; ``settings`` go before its usual ones here."""
        self._folder = folder
        self._port = free_port()
        server = {name: conninfo_to_dict(conninfo).get(name) for name in ("host", "port", "user", "password")}
        target = " ".join(f"{name}='{value}'" for name, value in server.items() if value)
        lines = [f"{name} = {value}" for name, value in (_SETTINGS | {"listen_port": self._port} | settings).items()]
        (folder / "pgbouncer.ini").write_text("\n".join(["[databases]", f"* = {target}", "[pgbouncer]", *lines, ""]))
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        assert PROGRAM, "pgbouncer is not installed"
        command = [*(_UNPRIVILEGED if os.geteuid() == 0 else []), PROGRAM, str(self._folder / "pgbouncer.ini")]
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
        """Run a command of its own."""
        with psycopg.connect(self.in_front_of("dbname=pgbouncer user=postgres"), autocommit=True) as db:
            cursor = db.execute(command.encode())
            return cursor.fetchall() if cursor.description else []

    def in_front_of(self, conninfo: str) -> str:
        """Give the connection string that leads to a database through it."""
        return make_conninfo(conninfo, host="127.0.0.1", port=self._port)

    def log(self) -> str:
        """Read what it has logged so far."""
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.kill()
        self.process.wait(timeout=60)


@contextmanager
def running(conninfo: str, **settings: object) -> Iterator[PgBouncer]:
    """Run one in front of a server."""
    with TemporaryDirectory() as folder:
        pgbouncer = PgBouncer(Path(folder), conninfo, **settings)
        try:
            yield pgbouncer
        finally:
            pgbouncer.kill()


_shared = ExitStack()


@cache
def shared(server: str) -> PgBouncer:
    """Give the one in front of a server that all tests of this process share."""
    return _shared.enter_context(running(server))


def stop_shared() -> None:
    """Stop those that are shared."""
    _shared.close()
