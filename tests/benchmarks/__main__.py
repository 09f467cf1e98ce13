"""Runs the benchmarks and prints their figures as Markdown, ratios first: machines differ, and are noisy.

All candidates run on one PostgreSQL, side by side; rounds are interleaved (A B C A B C …), and medians are taken, of
the ratios, too, of which each round has one.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psycopg

from tests.support.postgres import Postgres

from . import growth, machine
from .candidates import COMMANDS, Candidate
from .loads import Load, Result, pgbench, wrk
from .operations import ALL, CREATE, PATCH, READ, TOGGLE, Operation, page

CONNECTIONS = (1, 16, 128)
MOST = 16  # connections to PostgreSQL alone; it takes 100
TASKS = 10_000
HEAD = (
    "| operation, connections | service, /s | of bare | of PostgreSQL | of FastAPI | p50, ms | p99, ms | CPU, µs |\n|"
    + " --- |" * 8
)
FILL = """
    INSERT INTO tasks (user_id, title, description, completed, created_at)
    SELECT 'local', 'Task number ' || n, 'Some words about it', n %% 3 = 0, now() - n * interval '1 minute'
    FROM generate_series(%(count)s, 1, -1) AS n
"""


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--seconds", type=int, default=1, help="of each round")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement, for the median")
    parser.add_argument("--only", choices=["compare", "growth"], help="one half of it")
    options = parser.parse_args()
    print(f"{machine.describe()}; medians of {options.rounds} rounds of {options.seconds} s\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        postgres = Postgres(Path(folder) / "server")
        try:
            if options.only != "growth":
                compare(postgres.conninfo, Path(folder), options.rounds, options.seconds)
            if options.only != "compare":
                growth.measure(postgres.conninfo, Path(folder), options.rounds, options.seconds)
        finally:
            postgres.stop()


@contextmanager
def candidates(conninfo: str, folder: Path) -> Iterator[list[Candidate]]:
    """Run all candidates; the service is the first, and makes the tables."""
    running: list[Candidate] = []
    try:
        running.extend(Candidate(name, conninfo, folder / f"{name}.log") for name in COMMANDS)
        yield running
    finally:
        for candidate in running:
            candidate.stop()


def compare(conninfo: str, folder: Path, rounds: int, seconds: int) -> None:
    """Compare the candidates."""
    with candidates(conninfo, folder) as running:
        print("| | start, s | idle memory, MiB |\n| --- | --- | --- |")
        for candidate in running:
            print(f"| {candidate.name} | {candidate.start_seconds:.1f} | {candidate.memory():.0f} |")
        first, later = (own_start(folder) for _ in range(2))
        print(f"\nThe service with a PostgreSQL of its own: {first:.1f} s for the first start, then {later:.1f} s")
        fill(conninfo)
        print(f"\n{HEAD}", flush=True)
        deep = page("deep", cursor=deep_cursor(conninfo))
        for operation in (ALL, page("first"), deep, READ, CREATE, PATCH, TOGGLE):
            for connections in CONNECTIONS:
                # Many clients that wait for lists of megabytes need some time for one each.
                load = Load(connections, seconds * 4 if operation is ALL and connections > MOST else seconds, TASKS)
                print(row(running, conninfo, operation, load, rounds), flush=True)
                if operation is CREATE:
                    fill(conninfo)
        after = ", ".join(f"{candidate.name} {candidate.memory():.0f}" for candidate in running)
        print(f"\nMemory after all this, MiB: {after}", flush=True)


def own_start(folder: Path) -> float:
    """Give how long the service takes to start with a PostgreSQL of its own."""
    service = Candidate("service", "", folder / "own.log")
    service.stop()
    return service.start_seconds


def row(running: list[Candidate], conninfo: str, operation: Operation, load: Load, rounds: int) -> str:
    """Measure an operation with all candidates, and give a row of the table."""
    seen: dict[str, list[Result]] = {candidate.name: [] for candidate in running}
    alone = []
    for _ in range(rounds):
        for candidate in running:
            seen[candidate.name].append(wrk(candidate, operation, load))
        if load.connections <= MOST:
            alone.append(pgbench(conninfo, operation, load))

    def of(name: str, figure: Callable[[Result], float]) -> float:
        return median(figure(result) for result in seen[name])

    def of_each(figure: Callable[[Result], float], digits: int) -> str:
        return " / ".join(f"{of(name, figure):.{digits}f}" for name in seen)

    def beside(rates: Iterable[float]) -> float:
        return median(ours.rate / theirs for ours, theirs in zip(seen["service"], rates, strict=True))

    figures = [
        f"{of('service', lambda result: result.rate):.0f}",
        f"{beside(result.rate for result in seen['bare']):.2f}",
        f"{beside(alone):.2f}" if alone else "",
        f"{beside(result.rate for result in seen['FastAPI']):.1f}",
        of_each(lambda result: result.p50, 1),
        of_each(lambda result: result.p99, 1),
        of_each(lambda result: result.cpu, 0),
    ]
    return f"| {operation.name}, {load.connections} | {' | '.join(figures)} |"


def fill(conninfo: str) -> None:
    """Make the tasks anew, as many as there should be, with the ids from 1 on."""
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute("TRUNCATE tasks RESTART IDENTITY CASCADE")
        db.execute(FILL, {"count": TASKS})
        db.execute("VACUUM ANALYZE tasks")


def deep_cursor(conninfo: str) -> str:
    """Give the cursor of a page near the end."""
    with psycopg.connect(conninfo) as db:
        row = db.execute(
            "SELECT (extract(epoch FROM created_at) * 1000000)::bigint || '_' || id FROM tasks"
            " ORDER BY created_at, id OFFSET 100 LIMIT 1"
        ).fetchone()
    assert row
    return str(row[0])


main()
