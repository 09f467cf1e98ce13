"""How PostgreSQL runs the statements on a table of some size: through its indexes, whatever the parameters are."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import TupleRow

from tests.conftest import new_database
from todo_api import migrations, statements

TASKS = {name: statement for name, statement in statements.load().items() if name.startswith("tasks/")}
PARAMETERS = {
    "user_id": "user 3",
    "task_id": "4321",
    "limit": "50",
    "task": '{"title": "a"}',
    "changes": '{"title": "a"}',
}


@pytest.fixture(scope="module")
def full_table(conninfo: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Give a connection to a database of its own, with 20 000 tasks of 5 users."""
    with new_database(conninfo) as database:
        migrations.apply(database)
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(
                """
                INSERT INTO tasks (user_id, title, created_at, updated_at)
                SELECT 'user ' || n % 5, 'Task ' || n, now() - n * interval '1 minute', now()
                FROM generate_series(1, 20000) AS n
                """
            )
            connection.execute("ANALYZE tasks")
            connection.execute("SET plan_cache_mode = force_generic_plan")
            yield connection


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give every node of a plan."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def plan_of(connection: psycopg.Connection[TupleRow], name: str, text: bytes) -> list[dict[str, Any]]:
    """Give the nodes of the plan that PostgreSQL makes for a statement without knowing its parameters."""
    parameters = sorted(TASKS[name].parameters)
    numbered = text.decode() % {parameter: f"${number}" for number, parameter in enumerate(parameters, 1)}
    connection.execute(f"PREPARE statement AS {numbered}".encode())
    values = sql.SQL(", ").join(sql.Literal(PARAMETERS[parameter]) for parameter in parameters)
    explained = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE statement ({})").format(values)).fetchone()
    connection.execute("DEALLOCATE statement")
    assert explained
    return list(nodes(explained[0][0]["Plan"]))


def check(plan: list[dict[str, Any]]) -> None:
    """Check that a plan finds tasks through an index, already in order, and looks at the rows of one user only."""
    assert not [node["Node Type"] for node in plan if "Sort" in node["Node Type"]]
    scans = [node for node in plan if node.get("Relation Name") == "tasks" and "Scan" in node["Node Type"]]
    assert {node["Node Type"] for node in scans} <= {"Index Scan"}
    assert all("$" in node["Index Cond"] for node in scans), "PostgreSQL knew the parameters"


@pytest.mark.parametrize("name", TASKS)
def test_each_statement_finds_tasks_through_an_index(name: str, full_table: psycopg.Connection[TupleRow]) -> None:
    plan = plan_of(full_table, name, TASKS[name].rows)
    check(plan)
    assert any("Index" in node["Node Type"] for node in plan) is (name != "tasks/create")


@pytest.mark.parametrize("name", TASKS)
def test_the_json_of_each_statement_costs_no_other_plan(name: str, full_table: psycopg.Connection[TupleRow]) -> None:
    wrapped = TASKS[name].rows_json if name == "tasks/list" else TASKS[name].row_json
    check(plan_of(full_table, name, wrapped))


@pytest.mark.parametrize("name", TASKS)
def test_psql_gets_the_same_plan(name: str, full_table: psycopg.Connection[TupleRow]) -> None:
    """With the values in the text, as psql puts them there."""
    values = {parameter: sql.Literal(value).as_string() for parameter, value in PARAMETERS.items()}
    text = TASKS[name].rows.decode() % values
    explained = full_table.execute(f"EXPLAIN (FORMAT JSON) {text}".encode()).fetchone()
    assert explained
    assert "Seq Scan" not in str(explained)
    assert "Sort" not in str(explained)
