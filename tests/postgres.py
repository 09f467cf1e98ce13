"""A PostgreSQL of a test's own, which it may harm."""

import signal
from pathlib import Path

import psycopg

from todo_api import cluster, socket_folder

from .conftest import wait_until


class Postgres:
    """A PostgreSQL of the embedded kind, on a socket in its folder."""

    def __init__(self, folder: Path) -> None:
        """Make it and start it."""
        self.cluster = folder.resolve() / "postgres"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            cluster.create(self.cluster, lock.fileno())
        self.conninfo = f"host={self.cluster} port={socket_folder.PORT} user=postgres dbname=postgres"
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        self.process = cluster.launch(self.cluster, self.cluster)
        wait_until(self.answers)

    def answers(self) -> bool:
        """Say whether it takes connections."""
        try:
            psycopg.connect(self.conninfo).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """End it as a crash does: PostgreSQL's immediate shutdown."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(timeout=60)

    def stop(self) -> None:
        """End it in order."""
        cluster.stop(self.cluster)
