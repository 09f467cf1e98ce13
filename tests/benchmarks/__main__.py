"""Run the benchmarks and print the figures as Markdown.

All candidates run at the same time on one PostgreSQL. The rounds are interleaved (A B C A B C …). Each figure is the
median of the rounds. Each ratio is the median of the ratios of the rounds, since the speed of a machine varies.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psycopg

from tests.support.postgres import Postgres

from . import growth, identity, machine
from .candidates import COMMANDS, Candidate
from .loads import Load, Result, pgbench, wrk
from .operations import ALL, CREATE, PATCH, READ, TOGGLE, Operation, page

CONNECTIONS = (1, 16, 128)
MAX_PGBENCH_CONNECTIONS = 16  # PostgreSQL accepts 100, which the candidates share
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
    """Run the benchmarks that the arguments select."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--seconds", type=int, default=1, help="length of each round")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds of each measurement")
    parser.add_argument("--only", choices=["compare", "growth", "identity"], help="run only one part")
    options = parser.parse_args()
    print(f"{machine.describe()}; medians of {options.rounds} rounds of {options.seconds} s\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        postgres = Postgres(Path(folder) / "server")
        try:
            for name, measure in {"compare": compare, "growth": growth.measure, "identity": identity.measure}.items():
                if options.only in {None, name}:
                    measure(postgres.conninfo, Path(folder), options.rounds, options.seconds)
        finally:
            postgres.stop()


@contextmanager
def candidates(conninfo: str, folder: Path) -> Iterator[list[Candidate]]:
    """Run all candidates. The service is the first one, and creates the tables."""
    running: list[Candidate] = []
    try:
        running.extend(Candidate(name, conninfo, folder / f"{name}.log") for name in COMMANDS)
        yield running
    finally:
        for candidate in running:
            candidate.stop()


def compare(conninfo: str, folder: Path, rounds: int, seconds: int) -> None:
    """Print the start times, the memory and the table of all operations for all candidates."""
    with candidates(conninfo, folder) as running:
        print("| | start, s | idle memory, MiB |\n| --- | --- | --- |")
        for candidate in running:
            print(f"| {candidate.name} | {candidate.start_seconds:.1f} | {candidate.memory():.0f} |")
        first, later = (embedded_start_seconds(folder) for _ in range(2))
        print(f"\nThe service with its embedded PostgreSQL: {first:.1f} s for the first start, then {later:.1f} s")
        fill(conninfo)
        print(f"\n{HEAD}", flush=True)
        deep = page("deep", cursor=deep_cursor(conninfo))
        for operation in (ALL, page("first"), deep, READ, CREATE, PATCH, TOGGLE):
            for connections in CONNECTIONS:
                # A list has megabytes, so many clients need more time until each has received one.
                load = Load(
                    connections,
                    seconds * 4 if operation is ALL and connections > MAX_PGBENCH_CONNECTIONS else seconds,
                    TASKS,
                )
                print(row(running, conninfo, operation, load, rounds), flush=True)
                if operation is CREATE:
                    fill(conninfo)
        after = ", ".join(f"{candidate.name} {candidate.memory():.0f}" for candidate in running)
        print(f"\nMemory after all operations, MiB: {after}", flush=True)


def embedded_start_seconds(folder: Path) -> float:
    """Return the seconds that the service takes to start with its embedded PostgreSQL."""
    service = Candidate("service", "", folder / "own.log")
    service.stop()
    return service.start_seconds


def row(running: list[Candidate], conninfo: str, operation: Operation, load: Load, rounds: int) -> str:
    """Measure an operation with all candidates, and return a row of the table."""
    seen: dict[str, list[Result]] = {candidate.name: [] for candidate in running}
    pgbench_rates = []
    for _ in range(rounds):
        for candidate in running:
            seen[candidate.name].append(wrk(candidate, operation, load))
        if load.connections <= MAX_PGBENCH_CONNECTIONS:
            pgbench_rates.append(pgbench(conninfo, operation, load))

    def of(name: str, figure: Callable[[Result], float]) -> float:
        return median(figure(result) for result in seen[name])

    def of_each(figure: Callable[[Result], float], digits: int) -> str:
        return " / ".join(f"{of(name, figure):.{digits}f}" for name in seen)

    def ratio_to(rates: Iterable[float]) -> float:
        return median(ours.rate / theirs for ours, theirs in zip(seen["service"], rates, strict=True))

    figures = [
        f"{of('service', lambda result: result.rate):.0f}",
        f"{ratio_to(result.rate for result in seen['bare']):.2f}",
        f"{ratio_to(pgbench_rates):.2f}" if pgbench_rates else "",
        f"{ratio_to(result.rate for result in seen['FastAPI']):.1f}",
        of_each(lambda result: result.p50, 1),
        of_each(lambda result: result.p99, 1),
        of_each(lambda result: result.cpu, 0),
    ]
    return f"| {operation.name}, {load.connections} | {' | '.join(figures)} |"


def fill(conninfo: str) -> None:
    """Replace all tasks with TASKS new ones, with ids from 1."""
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute("TRUNCATE tasks RESTART IDENTITY CASCADE")
        db.execute(FILL, {"count": TASKS})
        db.execute("VACUUM ANALYZE tasks")


def deep_cursor(conninfo: str) -> str:
    """Return the cursor of a page near the end."""
    with psycopg.connect(conninfo) as db:
        row = db.execute(
            "SELECT (extract(epoch FROM created_at) * 1000000)::bigint || '_' || id FROM tasks"
            " ORDER BY created_at, id OFFSET 100 LIMIT 1"
        ).fetchone()
    assert row
    return str(row[0])


main()
