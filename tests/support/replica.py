"""A PostgreSQL primary and its streaming standby for one test, which may stop or kill both."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import LiteralString

import psycopg

from tests.support.postgres import Postgres
from tests.support.processes import free_port, postmaster_in, send, servers_in, wait_until
from todo_api.embedded import cluster, programs, socket_folder

SETTINGS = """
dynamic_shared_memory_type = mmap  # a killed server would leave other shared memory in /dev/shm
wal_retrieve_retry_interval = 100ms  # a standby without a primary sleeps for this time, and does not notice a promotion
wal_sender_timeout = 0  # commits wait for a stopped standby, too
"""


class Server(Postgres):
    """One of the two servers, on a Unix socket in its folder and on a port of 127.0.0.1."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        """Store the folder of the cluster, and the command that runs PostgreSQL on it."""
        self.cluster = folder
        self.port = free_port()
        self.conninfo = f"host={folder} port={self.port} user=postgres dbname=postgres"
        self.command = [*command, "--listen-addresses=127.0.0.1", f"--port={self.port}"]

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        with cluster.log_of(self.cluster).open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self.answers)

    def copy(self, primary: "Server") -> None:
        """Make a new copy of the primary, and start as its standby."""
        owner = primary.cluster.stat()
        shutil.rmtree(self.cluster, ignore_errors=True)
        programs.find(None).run(
            "pg_basebackup",
            f"--dbname={primary.conninfo}",
            f"--pgdata={self.cluster}",
            "--checkpoint=fast",
            "--no-sync",
        )
        if socket_folder.is_root():
            for path in (self.cluster, *self.cluster.rglob("*")):
                os.chown(path, owner.st_uid, owner.st_gid)
        self.follow(primary)

    def follow(self, primary: "Server") -> None:
        """Start as the standby of the primary, and make the primary's commits wait for this standby."""
        (self.cluster / "standby.signal").touch()
        with (self.cluster / "postgresql.auto.conf").open("a", encoding="utf-8") as settings:
            settings.write(f"primary_conninfo = '{primary.conninfo}'\nsynchronous_standby_names = ''\n")
        self.start()
        primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.execute("SELECT pg_reload_conf()")
        wait_until(lambda: primary.execute("SELECT sync_state FROM pg_stat_replication") == "sync")

    def promote(self) -> None:
        """Promote the server to a primary that waits for no standby, and return at once."""
        self.execute("SELECT pg_promote(wait => false)")

    def execute(self, statement: LiteralString) -> object:
        """Run a statement and return the first value of its first row, or None without rows."""
        with psycopg.connect(self.conninfo, autocommit=True) as db:
            cursor = db.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None

    def send(self, signal_number: int) -> None:
        """Send a signal to all processes of the server, first to the postmaster so that it starts no others."""
        send(signal_number, postmaster_in(self.cluster), *servers_in(self.cluster))

    def crash(self) -> None:
        """Kill all processes of the server with SIGKILL."""
        self.send(signal.SIGKILL)
        self.process.wait(timeout=120)


class Pair:
    """A primary and its synchronous standby."""

    def __init__(self, folder: Path) -> None:
        """Create and start both servers."""
        first = Postgres(folder / "one")  # it creates the cluster and has the command, to which Server adds a port
        command = first.process.args
        assert isinstance(command, list)
        first.stop()
        with (first.cluster / "postgresql.conf").open("a", encoding="utf-8") as settings:
            settings.write(SETTINGS)
        self.primary = Server(first.cluster, command)
        self.primary.start()
        second = folder.resolve() / "two" / "postgres"
        second.parent.mkdir()
        self.standby = Server(second, [part.replace(str(first.cluster), str(second)) for part in command])
        self.standby.copy(self.primary)
        self.servers = (self.primary, self.standby)

    def swap(self) -> None:
        """Exchange the names of the primary and the standby."""
        self.primary, self.standby = self.standby, self.primary

    def url(self, *, network: bool) -> str:
        """Return the URL that leads to the server that accepts writes."""
        one, two = self.servers
        if network:
            hosts = f"postgres@127.0.0.1:{one.port},127.0.0.1:{two.port}/postgres?"
        else:
            hosts = f"postgres@/postgres?host={one.cluster},{two.cluster}&port={one.port},{two.port}&"
        return f"postgresql://{hosts}target_session_attrs=read-write"
