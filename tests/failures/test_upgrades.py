"""Clients write while the indexes and the keys of a table with a million tasks change."""

import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.database.test_migrations import BUILD
from tests.support.databases import as_url, yoyo_url
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Figure, Start
from tests.support.load import PAUSE, Clients
from tests.support.postgres import Postgres
from tests.support.processes import wait_until
from tests.support.service import Service

TASKS = 1_000_000
FILL = """
    INSERT INTO tasks (user_id, title, completed)
    SELECT 'user ' || n %% 100, n, n %% 2 = 0 FROM generate_series(1, %s) AS n
"""
BUILDING = "SELECT count(*)::int FROM pg_stat_progress_create_index"
MIGRATION = "0005.index-tasks-by-user"


class Calls(Clients):
    """Clients that toggle or read a task of their own. There are fewer than the service has threads."""

    def __init__(self, service: Service) -> None:
        """Create the tasks and start the clients."""
        self.service = service
        created = [service.client.post("/api/tasks", json={"title": "a"}) for _ in range(3)]
        self.calls: dict[str, list[tuple[str, int, float]]] = {task.headers["Location"]: [] for task in created}
        self._left = [*zip(self.calls, ("POST", "POST", "GET"), strict=True)]
        super().__init__(self._run, len(created))

    def _run(self) -> None:
        path, method = self._left.pop()
        with httpx.Client(base_url=self.service.url, timeout=60) as client:
            while not self.stopping.is_set():
                response = client.post(f"{path}/toggle") if method == "POST" else client.get(path)
                self.calls[path].append((method, response.status_code, time.monotonic()))
                if response.status_code != httpx.codes.OK:
                    time.sleep(PAUSE)

    def longest_wait(self, method: str, since: float) -> float:
        """Return the longest time since a moment in which no client had a success, in seconds."""
        moments = sorted(
            moment
            for calls in self.calls.values()
            for called, status, moment in list(calls)
            if called == method and status == httpx.codes.OK
        )
        return max(later - max(earlier, since) for earlier, later in pairwise(moments) if later > since)


@pytest.mark.long
def test_clients_write_while_a_million_tasks_are_indexed(tmp_path: Path, start: Start, figure: Figure) -> None:
    postgres = Postgres(tmp_path / "data")
    service = start(DATABASE_URL=as_url(postgres.conninfo)).wait()
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute(FILL, [TASKS])
        db.execute("VACUUM ANALYZE tasks")

        flask_migrate = [sys.executable, "-m", "flask", "--app", "wsgi", "migrate"]
        settings = environment(DATABASE_URL=as_url(postgres.conninfo))

        def roll_back() -> None:
            arguments = ["--batch", "--revision", MIGRATION, "--database", yoyo_url(postgres.conninfo)]
            command = [sys.executable, "-m", "yoyo", "rollback", *arguments, "sql/migrations"]
            subprocess.run(command, cwd=ROOT, env=environment(), check=True)

        def migrate() -> None:
            subprocess.run(flask_migrate, cwd=ROOT, env=settings, check=True)

        def migrate_killed() -> None:
            for seconds in (0, 0.3):
                with subprocess.Popen(flask_migrate, cwd=ROOT, env=settings) as process:
                    wait_until(lambda: db.execute(BUILDING).fetchone() != (0,))
                    time.sleep(seconds)
                    process.kill()
                # PostgreSQL notices at the end of its statement that the client is gone.
                wait_until(lambda: db.execute(BUILDING).fetchone() == (0,))

        def build() -> None:
            for command in BUILD:
                db.execute(command.encode())

        with Calls(service) as clients:
            time.sleep(1)
            for name, change in {
                "rolled back": roll_back,
                "migrated, but killed": migrate_killed,
                "migrated": migrate,
                "rolled back again": roll_back,
                "indexed concurrently": build,
                "migrated with its indexes built": migrate,
            }.items():
                began = time.monotonic()
                change()
                time.sleep(1)
                for what, method in (("writes", "POST"), ("reads", "GET")):
                    waited = clients.longest_wait(method, began)
                    figure(f"1 000 000 tasks {name}: the longest time without {what}, s", round(waited, 2))
        for path, calls in clients.calls.items():
            statuses = Counter(status for _, status, _ in calls)
            assert set(statuses) <= {200, 503}
            changes = service.client.get(path).json()["version"] - 1
            toggles = Counter(status for method, status, _ in calls if method == "POST")
            assert toggles[200] <= changes <= toggles.total()
        keys = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'tasks_pkey'"
        assert db.execute(keys).fetchall() == [("PRIMARY KEY (user_id, id)",)]
    assert service.stop() == 0
    postgres.stop()
