"""The cost of calls as the number of tasks grows."""

from pathlib import Path
from statistics import median

import matplotlib as mpl
import psycopg
from matplotlib.figure import Figure
from psycopg import sql
from psycopg.conninfo import make_conninfo

from .candidates import Candidate
from .loads import Load, wrk
from .operations import ALL, CREATE, PATCH, READ, Operation, page

CHART = Path(__file__).with_name("growth.svg")
CONNECTIONS = 4
# Name: users, tasks of each user. The requests come from the first user.
SIZES = {
    "10 000": (1, 10_000),
    "100 000": (1, 100_000),
    "1 000 000": (1, 1_000_000),
    "10 000 users with 100 tasks each": (10_000, 100),
}
FILL = """
    INSERT INTO tasks (user_id, title, description, completed, created_at)
    SELECT CASE u WHEN 1 THEN 'local' ELSE 'user ' || u END, 'Task number ' || n, 'Some words about it', n %% 3 = 0,
        now() - n * interval '1 minute'
    FROM generate_series(1, %(users)s) AS u, generate_series(%(tasks)s, 1, -1) AS n
    ORDER BY u, n DESC
"""
DEEP = """
    SELECT (extract(epoch FROM created_at) * 1000000)::bigint || '_' || id FROM tasks WHERE user_id = 'local'
    ORDER BY created_at, id OFFSET %(left)s LIMIT 1
"""


def measure(conninfo: str, folder: Path, rounds: int, seconds: int) -> None:
    """Measure each operation at each size, print a table and draw a chart."""
    running = [prepare(conninfo, folder, number, *size) for number, size in enumerate(SIZES.values())]
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


def operations(cursor: str) -> dict[str, Operation]:
    """Return the measured operations by name. ``cursor`` is that of a page near the end."""
    return {
        "list, at most 10 000": ALL,
        "page of 50, first": page("first"),
        "page of 50, deep": page("deep", cursor=cursor),
        "page of 50, completed": page("completed", filters="&completed=true"),
        "page of 50, deep, completed": page("deep, completed", cursor=cursor, filters="&completed=true"),
        "page of 50, q": page("q", filters="&q=7"),
        "read": READ,
        "patch": PATCH,
        "create": CREATE,
    }


def prepare(conninfo: str, folder: Path, number: int, users: int, tasks: int) -> tuple[Candidate, str, int]:
    """Run a service on a new database. Return it, the cursor of a deep page, and the last id of the first user."""
    name = f"size{number}"
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    own_database = make_conninfo(conninfo, dbname=name)
    candidate = Candidate("service", own_database, folder / f"{name}.log")
    with psycopg.connect(own_database, autocommit=True) as db:
        db.execute(FILL, {"users": users, "tasks": tasks})
        db.execute("VACUUM ANALYZE tasks")
        row = db.execute(DEEP, {"left": min(tasks - 1, 300)}).fetchone()
    assert row
    return candidate, str(row[0]), tasks


def draw(table: dict[str, list[float]]) -> None:
    """Draw the costs as ratios to those at the smallest size."""
    mpl.rcParams["svg.hashsalt"] = "growth"  # the same figures make the same file
    figure = Figure(figsize=(8, 4), layout="tight")
    axes = figure.subplots()
    for name, figures in table.items():
        axes.plot(list(SIZES), [cost / figures[0] for cost in figures], marker="o", label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("cost of a request, at 10 000 tasks = 1")
    axes.legend(fontsize="small")
    figure.savefig(CHART, metadata={"Date": None})
