"""A PostgreSQL of a test's own, which it may harm."""

import signal
from pathlib import Path

import psycopg

from tests.support.processes import wait_until
from todo_api.embedded import cluster, socket_folder

# Tests take away processes, and never the power. Where others keep the disk busy, a commit that waits for it can take a
# second, and get a 503 that no test expects.
SETTINGS = "fsync = off\n"
TERMINATE = """
    SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
    WHERE application_name = 'todo_api' AND backend_type = 'client backend'
"""


class Postgres:
    """A PostgreSQL of the embedded kind, on a socket in its folder."""

    def __init__(self, folder: Path) -> None:
        """Make it and start it."""
        self.cluster = folder.resolve() / "postgres"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            cluster.create(self.cluster, lock.fileno())
        with (self.cluster / "postgresql.conf").open("a", encoding="utf-8") as settings:
            settings.write(SETTINGS)
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


def connections(postgres: Postgres) -> int:
    """Count the service's connections."""
    with psycopg.connect(postgres.conninfo) as db:
        rows = db.execute("SELECT 1 FROM pg_stat_activity WHERE application_name = 'todo_api'").fetchall()
    return len(rows)


def terminate(postgres: Postgres) -> int:
    """End the service's connections, as an administrator or a failover does, and say how many there were."""
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        row = db.execute(TERMINATE).fetchone()
    assert row
    return int(row[0])
