"""The cost of tokens, of row-level security and of metrics."""

import json
from pathlib import Path
from statistics import median

import psycopg

from tests.support.issuer import AUDIENCE, ISSUER, SigningKey
from tests.support.processes import free_port

from .candidates import Candidate
from .loads import Load, wrk
from .operations import CREATE, READ, TOGGLE, page

CONNECTIONS = 16
USERS = 1000
TASKS = 100  # of each user
KEYS = {"Ed25519": SigningKey("ed25519"), "RS256": SigningKey("rs256", "RS256")}
FILL = """
    TRUNCATE tasks RESTART IDENTITY CASCADE;
    INSERT INTO tasks (user_id, title, description)
    SELECT 'local', 'Task number ' || n, 'Some words about it' FROM generate_series(1, 10000) AS n;
    INSERT INTO tasks (user_id, title, description)
    SELECT 'user ' || u, 'Task number ' || n, 'Some words about it'
    FROM generate_series(1, 1000) AS u, generate_series(1, 100) AS n
    ORDER BY u;
    ANALYZE tasks
"""


def measure(conninfo: str, folder: Path, rounds: int, seconds: int) -> None:
    """Measure operations with and without each of them, and print a table of the rates as ratios."""
    key_set = folder / "keys.json"
    key_set.write_text(json.dumps({"keys": [key.jwk for key in KEYS.values()]}))
    settings = {"AUTH_JWKS": key_set, "AUTH_ISSUER": ISSUER, "AUTH_AUDIENCE": AUDIENCE}
    running = {
        "without": Candidate("service", conninfo, folder / "without.log", DATABASE_ROLE=""),
        "metrics": Candidate("service", conninfo, folder / "metrics.log", DATABASE_ROLE="", METRICS_PORT=free_port()),
        "role": Candidate("service", conninfo, folder / "role.log"),
        "tokens": Candidate("service", conninfo, folder / "tokens.log", **settings),
    }
    one_user = Load(CONNECTIONS, seconds, 10_000)
    loads = {
        "without": (running["without"], one_user),
        "metrics": (running["metrics"], one_user),
        "row-level security": (running["role"], one_user),
    }
    for name, key in KEYS.items():
        for users in (["local"], [f"user {number}" for number in range(1, USERS + 1)]):
            tokens = folder / f"{name} {len(users)}"
            tokens.write_text("".join(f"{key.token(user)}\n" for user in users))
            tasks, first = (10_000, 1) if len(users) == 1 else (TASKS, 10_001)
            load = Load(CONNECTIONS, seconds, tasks, first, tokens)
            loads[f"{name}, {len(users)} user{'s' * (len(users) > 1)}"] = running["tokens"], load
    print(f"\n| | {' | '.join(loads)} |\n|{' --- |' * (len(loads) + 1)}", flush=True)
    try:
        for operation in (READ, page("first"), CREATE, TOGGLE):
            with psycopg.connect(conninfo, autocommit=True) as db:
                db.execute(FILL)
            rates: dict[str, list[float]] = {name: [] for name in loads}
            for _ in range(rounds):
                for name, (candidate, load) in loads.items():
                    rates[name].append(wrk(candidate, operation, load).rate)
            print(f"| {operation.name} | {' | '.join(figures(rates))} |", flush=True)
    finally:
        for candidate in running.values():
            candidate.stop()


def figures(rates: dict[str, list[float]]) -> list[str]:
    """Return the first rate, and the ratios of the others to it, as medians of the rounds."""
    first, *others = rates.values()
    ratios = [median(ours / plain for ours, plain in zip(seen, first, strict=True)) for seen in others]
    return [f"{median(first):.0f}/s", *(f"{ratio:.2f}" for ratio in ratios)]
