"""The cost of calls as the number of tasks grows."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib as mpl
import psycopg
from matplotlib.figure import Figure
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.databases import migrate

from .candidates import Candidate
from .loads import Load, pgbench, wrk
from .operations import ALL, CREATE, PATCH, READ, TOGGLE, Operation, page

CHART = Path(__file__).with_name("growth.svg")
CONNECTIONS = 4


@dataclass(frozen=True)
class Size:
    """A number of users and of tasks of each. The requests come from the first user."""

    users: int
    tasks: int
    open_every: int = 0  # one in so many tasks is open; 0 for two in three
    partitioned: bool = False  # whether the tables are shared out by user over 8 partitions


SIZES = {
    "10 000": Size(1, 10_000),
    "100 000": Size(1, 100_000),
    "1 000 000": Size(1, 1_000_000),
    "1 000 000, of which 50 are open": Size(1, 1_000_000, open_every=20_000),
    "1 000 000, partitioned": Size(1, 1_000_000, partitioned=True),
    "10 000 users with 100 tasks each": Size(10_000, 100),
    "10 000 users with 100 tasks each, partitioned": Size(10_000, 100, partitioned=True),
}
FILL = """
    INSERT INTO tasks (user_id, title, description, completed, created_at)
    SELECT CASE u WHEN 1 THEN 'local' ELSE 'user ' || u END, 'Task number ' || n, 'Some words about it',
        CASE %(open_every)s WHEN 0 THEN n %% 3 = 0 ELSE n %% %(open_every)s <> 0 END, now() - n * interval '1 minute'
    FROM generate_series(1, %(users)s) AS u, generate_series(%(tasks)s, 1, -1) AS n
    ORDER BY u, n DESC
"""
DEEP = """
    SELECT (extract(epoch FROM created_at) * 1000000)::bigint || '_' || id FROM tasks WHERE user_id = 'local'
    ORDER BY created_at, id OFFSET %(left)s LIMIT 1
"""


def measure(conninfo: str, folder: Path, rounds: int, seconds: int) -> None:
    """Measure each operation at each size, print a table and draw a chart."""
    running = [prepare(conninfo, folder, f"size{number}", size) for number, size in enumerate(SIZES.values())]
    table: dict[str, list[float]] = {}
    try:
        for name in operations(""):
            costs: list[list[float]] = [[] for _ in SIZES]
            for _ in range(rounds):
                for place, (candidate, cursor, ids) in enumerate(running):
                    load = Load(CONNECTIONS, seconds, ids)
                    costs[place].append(1000 / wrk(candidate, operations(cursor)[name], load).rate)
            table[name] = [median(cost) for cost in costs]
    finally:
        for candidate, *_ in running:
            candidate.stop()
    print(f"\n| ms per request (ratio to 10 000 tasks) | {' | '.join(SIZES)} |\n|{' --- |' * (len(SIZES) + 1)}")
    for name, figures in table.items():
        print(f"| {name} | {' | '.join(f'{cost:.2f} ({cost / figures[0]:.2f})' for cost in figures)} |")
    draw(table)
    measure_toggles(conninfo, folder, rounds, seconds)


def measure_toggles(conninfo: str, folder: Path, rounds: int, seconds: int) -> None:
    """Measure what the index of open tasks costs a toggle: with it and without it in turn, in pairs."""
    running = [prepare(conninfo, folder, f"toggles{number}", SIZES["10 000"]) for number in range(2)]
    with psycopg.connect(make_conninfo(conninfo, dbname="toggles1"), autocommit=True) as db:
        db.execute("DROP INDEX tasks_open_newest_first")
    ratios: dict[str, list[float]] = {"service": [], "PostgreSQL": []}
    try:
        for _ in range(2 * rounds):
            loads = [(candidate, Load(CONNECTIONS, seconds, ids)) for candidate, _, ids in running]
            with_index, without = (wrk(candidate, TOGGLE, load).rate for candidate, load in loads)
            ratios["service"].append(with_index / without)
            with_index, without = (
                pgbench(make_conninfo(conninfo, dbname=f"toggles{number}"), TOGGLE, load)
                for number, (_, load) in enumerate(loads)
            )
            ratios["PostgreSQL"].append(with_index / without)
    finally:
        for candidate, *_ in running:
            candidate.stop()
    print("\nToggles with the index of open tasks, of those without it:")
    for name, found in ratios.items():
        print(f"{name}: {median(found):.2f} (from {min(found):.2f} to {max(found):.2f})")


def operations(cursor: str) -> dict[str, Operation]:
    """Return the measured operations by name. ``cursor`` is that of a page near the end."""
    return {
        "list, at most 10 000": ALL,
        "page of 50, first": page("first"),
        "page of 50, deep": page("deep", cursor=cursor),
        "page of 50, completed": page("completed", filters="&completed=true"),
        "page of 50, open": page("open", filters="&completed=false"),
        "page of 50, deep, completed": page("deep, completed", cursor=cursor, filters="&completed=true"),
        "page of 50, q": page("q", filters="&q=7"),
        "read": READ,
        "toggle": TOGGLE,
        "patch": PATCH,
        "create": CREATE,
    }


def prepare(conninfo: str, folder: Path, name: str, size: Size) -> tuple[Candidate, str, int]:
    """Run a service on a new database. Return it, the cursor of a deep page, and the last id of the first user."""
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    own_database = make_conninfo(conninfo, dbname=name)
    migrate(own_database, partitioned=size.partitioned)
    candidate = Candidate("service", own_database, folder / f"{name}.log")
    with psycopg.connect(own_database, autocommit=True) as db:
        db.execute(FILL, {"users": size.users, "tasks": size.tasks, "open_every": size.open_every})
        db.execute("VACUUM ANALYZE tasks")
        row = db.execute(DEEP, {"left": min(size.tasks - 1, 300)}).fetchone()
    assert row
    return candidate, str(row[0]), size.tasks


def draw(table: dict[str, list[float]]) -> None:
    """Draw the costs as ratios to those at the smallest size."""
    mpl.rcParams["svg.hashsalt"] = "growth"  # the same figures make the same file
    figure = Figure(figsize=(10, 6), layout="tight")
    axes = figure.subplots()
    names = [name.replace(", ", ",\n").replace(" with ", "\nwith ") for name in SIZES]
    for name, figures in table.items():
        axes.plot(names, [cost / figures[0] for cost in figures], marker="o", label=name)
    axes.tick_params(axis="x", labelsize="small")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("cost of a request, at 10 000 tasks = 1")
    axes.legend(fontsize="small")
    figure.savefig(CHART, metadata={"Date": None})
