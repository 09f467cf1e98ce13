"""Concurrent clients: some order of all calls explains every response, even while connections are cut."""

import os
import random
import time
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.databases import as_url
from tests.support.fixtures import Figure
from tests.support.histories import explain
from tests.support.postgres import Postgres
from tests.support.races import Race
from tests.support.service import Service, workers

CLIENTS = 8
SEEDS = [os.environ["HISTORIES_SEED"]] if "HISTORIES_SEED" in os.environ else []
CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'todo_api'"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Run a PostgreSQL."""
    running = Postgres(tmp_path_factory.mktemp("histories") / "server")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def service(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service of two workers on it."""
    log = tmp_path_factory.mktemp("histories") / "log"
    running = Service(log, DATABASE_URL=as_url(postgres.conninfo), WEB_CONCURRENCY=2).wait()
    yield running
    assert running.stop() == 0


def disturb(race: Race, postgres: Postgres, cuts: int) -> None:
    """Terminate the service's connections this many times. Halfway, crash PostgreSQL and then kill a worker."""
    chance = random.Random(race.seed)
    events = {cuts // 2: crash, cuts // 2 + 1: kill_a_worker}
    for number in range(cuts):
        with psycopg.connect(postgres.conninfo, autocommit=True) as db:
            if chance.random() < 0.7:
                delay_commits(db, chance.uniform(0.02, 0.1))
            db.execute(CUT)
            db.execute("ALTER SYSTEM RESET synchronous_standby_names")
            db.execute("SELECT pg_reload_conf()")
        if number in events:
            events[number](race, postgres)
        time.sleep(chance.uniform(0.02, 0.3))


def delay_commits(db: psycopg.Connection[TupleRow], seconds: float) -> None:
    """Make commits wait for a missing standby, so that some take effect although their connection is cut."""
    db.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    db.execute("SELECT pg_reload_conf()")
    time.sleep(seconds)


def crash(race: Race, postgres: Postgres) -> None:
    """End PostgreSQL as a crash does, and restart it."""
    race.crashing.set()
    postgres.kill()
    race.crashing.clear()
    postgres.start()


def kill_a_worker(race: Race, _: Postgres) -> None:
    """Kill one of the service's workers."""
    workers(race.service)[0].kill()


def explain_race(service: Service, postgres: Postgres, seed: str, cuts: int) -> str:
    """Run a race with a seed, check that an order explains each task's history, and return a summary.

    Raises:
        UnexplainedError: no order explains a history. HISTORIES_SEED repeats the clients' choices, but not the timing.

    """
    with psycopg.connect(postgres.conninfo, autocommit=True) as db:
        db.execute("TRUNCATE tasks, idempotency_keys")
    race = Race(service, seed)
    try:
        histories = race.run(CLIENTS, lambda: disturb(race, postgres, cuts))
        order = [call for history in histories.values() for call in explain(history)]
    except Exception as error:
        error.add_note(f"HISTORIES_SEED={seed}")
        raise
    lost = sum(not call.answered for _, call in race.calls)
    effective = sum(not call.answered for call in order)
    assert effective, "no call without a response took effect, so the race has tested nothing"
    return (
        f"{len(race.calls)} calls on {len(histories)} tasks; {lost} without a response, {effective} of them took effect"
    )


@pytest.mark.parametrize("seed", SEEDS or ["1", "2"])
def test_an_order_explains_every_response_while_connections_are_cut(
    service: Service, postgres: Postgres, seed: str, figure: Figure
) -> None:
    figure(f"histories, HISTORIES_SEED={seed}", explain_race(service, postgres, seed, 18))


@pytest.mark.long
@pytest.mark.parametrize("number", range(6))
def test_an_order_explains_every_response_in_longer_races(
    service: Service, postgres: Postgres, number: int, figure: Figure
) -> None:
    seed = SEEDS[0] if SEEDS else uuid.uuid4().hex[:8]
    figure(f"histories, HISTORIES_SEED={seed}", explain_race(service, postgres, seed, 90))
