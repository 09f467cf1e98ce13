"""Two PostgreSQL servers of a test's own, one of which streams from the other; the test may harm both."""

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import LiteralString

import psutil
import psycopg

from tests.support.postgres import Postgres
from tests.support.processes import free_port, postmaster_in, servers_in, wait_until
from todo_api.embedded import cluster, socket_folder

SETTINGS = """
dynamic_shared_memory_type = mmap  # in the cluster's folder: a killed server's would stay in /dev/shm
wal_retrieve_retry_interval = 100ms  # a standby that lost its primary sleeps so long, deaf to a promotion
wal_sender_timeout = 0  # a standby that is stopped stays the one that commits wait for
"""


class Server(Postgres):
    """One of the two, on a socket in its folder and on a port of 127.0.0.1."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        """Name it; ``command`` runs PostgreSQL on the folder."""
        self.cluster = folder
        self.port = free_port()
        self.conninfo = f"host={folder} port={self.port} user=postgres dbname=postgres"
        self.command = [*command, "--listen-addresses=127.0.0.1", f"--port={self.port}"]

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        with cluster.log_of(self.cluster).open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self.answers)

    def copy(self, primary: "Server") -> None:
        """Become the other's standby, from a copy made now."""
        owner = primary.cluster.stat()
        shutil.rmtree(self.cluster, ignore_errors=True)
        cluster.run(
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
        """Start as the other's standby, and have commits there wait for it."""
        (self.cluster / "standby.signal").touch()
        with (self.cluster / "postgresql.auto.conf").open("a", encoding="utf-8") as settings:
            settings.write(f"primary_conninfo = '{primary.conninfo}'\nsynchronous_standby_names = ''\n")
        self.start()
        primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.execute("SELECT pg_reload_conf()")
        wait_until(lambda: primary.execute("SELECT sync_state FROM pg_stat_replication") == "sync")

    def promote(self) -> None:
        """Ask it to become a primary, which waits for no standby."""
        self.execute("SELECT pg_promote(wait => false)")

    def execute(self, statement: LiteralString) -> object:
        """Run a statement and give the first value of its first row, if it has any."""
        with psycopg.connect(self.conninfo, autocommit=True) as db:
            cursor = db.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None

    def send(self, signal_number: int) -> None:
        """Send a signal to all its processes, to the postmaster first: it starts no others then."""
        for process in [postmaster_in(self.cluster), *servers_in(self.cluster)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)

    def crash(self) -> None:
        """End it without a word to anybody."""
        self.send(signal.SIGKILL)
        self.process.wait(timeout=60)


class Pair:
    """A primary and its synchronous standby."""

    def __init__(self, folder: Path) -> None:
        """Make and start both."""
        alone = Postgres(folder / "one")  # made and started as the embedded one is; from here on, with a port
        command = alone.process.args
        assert isinstance(command, list)
        alone.stop()
        with (alone.cluster / "postgresql.conf").open("a", encoding="utf-8") as settings:
            settings.write(SETTINGS)
        self.primary = Server(alone.cluster, command)
        self.primary.start()
        other = folder.resolve() / "two" / "postgres"
        other.parent.mkdir()
        self.standby = Server(other, [part.replace(str(alone.cluster), str(other)) for part in command])
        self.standby.copy(self.primary)
        self.servers = (self.primary, self.standby)

    def swap(self) -> None:
        """Call the primary the standby, and the other way round."""
        self.primary, self.standby = self.standby, self.primary

    def url(self, *, network: bool) -> str:
        """Give the URL that leads to whichever of the two takes writes."""
        one, two = self.servers
        if network:
            hosts = f"postgres@127.0.0.1:{one.port},127.0.0.1:{two.port}/postgres?"
        else:
            hosts = f"postgres@/postgres?host={one.cluster},{two.cluster}&port={one.port},{two.port}&"
        return f"postgresql://{hosts}target_session_attrs=read-write"
