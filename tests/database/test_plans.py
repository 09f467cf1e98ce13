"""How PostgreSQL runs the statements on a million tasks: through its indexes, whatever the parameters are."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import TupleRow

from tests.support.databases import new_database
from todo_api.database import migrations, statements

TASKS = {name: statement for name, statement in statements.load().items() if name.startswith("tasks/")}
PARAMETERS = {
    "user_id": "user 3",
    "task_id": "4321",
    "if_match": "{1,2}",
    "task": '{"title": "a"}',
    "idempotency_key": "key 3",
    "changes": '{"title": "a"}',
    "limit": "50",
    "completed": "true",
    "q": "milk",
    "after": "1768123800123456_4321",
}
BY_ID, NEWEST = {"tasks_pkey"}, {"tasks_newest_first"}
INDEXES = {
    "tasks/create": set(),
    "tasks/create_once": {"idempotency_keys_oldest_first", "idempotency_keys_pkey"},
    "tasks/delete": BY_ID,
    "tasks/get": BY_ID,
    "tasks/list": NEWEST,
    "tasks/toggle": BY_ID,
    "tasks/update": BY_ID,
}
FILTERS = [
    {"completed": completed, "q": q, "after": after, "limit": limit}
    for completed, q, after, limit in product(
        ["", "true"], ["", "milk"], ["253402300800000000_1", PARAMETERS["after"]], ["2", "10001"]
    )
]


@pytest.fixture(scope="module")
def full_table(conninfo: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Give a connection to a database of its own: a million tasks, most of them one user's, few completed."""
    with new_database(conninfo) as database:
        migrations.apply(database)
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(
                """
                INSERT INTO tasks (user_id, title, completed, created_at, updated_at)
                SELECT
                    CASE WHEN n % 10 = 0 THEN 'user ' || n % 50 ELSE 'user 3' END,
                    'Task ' || n,
                    n % 5000 = 3,
                    now() - n * interval '10 seconds',
                    now()
                FROM generate_series(1, 1000000) AS n
                """
            )
            connection.execute(
                """
                INSERT INTO idempotency_keys (user_id, key, task, task_id, created_at)
                SELECT 'user ' || n % 5, 'key ' || n, '{"title": "a"}', n, now() - n * interval '1 minute'
                FROM generate_series(1, 20000) AS n
                """
            )
            connection.execute("ANALYZE tasks, idempotency_keys")
            connection.execute("SET plan_cache_mode = force_generic_plan")  # as the service's own connections have it
            yield connection


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give every node of a plan."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def plan_of(
    connection: psycopg.Connection[TupleRow], name: str, text: bytes, values: dict[str, str] = PARAMETERS
) -> list[dict[str, Any]]:
    """Give the nodes of the plan that PostgreSQL makes for a statement without knowing its parameters."""
    parameters = sorted(TASKS[name].parameters)
    numbered = text.decode() % {parameter: f"${number}" for number, parameter in enumerate(parameters, 1)}
    connection.execute(f"PREPARE statement AS {numbered}".encode())
    literals = sql.SQL(", ").join(sql.Literal(values[parameter]) for parameter in parameters)
    explained = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE statement ({})").format(literals)).fetchone()
    connection.execute("DEALLOCATE statement")
    assert explained
    return list(nodes(explained[0][0]["Plan"]))


def check(plan: list[dict[str, Any]]) -> None:
    """Check that a plan finds tasks through an index, already in order, and looks at the rows of one user only."""
    assert not [node["Node Type"] for node in plan if "Sort" in node["Node Type"]]
    scans = [node for node in plan if "Relation Name" in node and "Scan" in node["Node Type"]]
    assert {node["Node Type"] for node in scans} <= {"Index Scan"}
    known = [node for node in scans if node["Relation Name"] == "tasks" and "$" not in node["Index Cond"]]
    assert not known, "PostgreSQL knew the parameters"


@pytest.mark.parametrize("name", TASKS)
def test_each_statement_finds_tasks_through_an_index(name: str, full_table: psycopg.Connection[TupleRow]) -> None:
    plan = plan_of(full_table, name, TASKS[name].rows)
    check(plan)
    used = {node["Index Name"] for node in plan if "Index Name" in node}
    assert used == INDEXES[name]


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_a_page_is_read_in_the_indexs_order_from_its_cursor_on(
    values: dict[str, str], full_table: psycopg.Connection[TupleRow]
) -> None:
    for text in (TASKS["tasks/list"].rows, TASKS["tasks/list"].rows_json):
        plan = plan_of(full_table, "tasks/list", text, PARAMETERS | values)
        check(plan)
        [scan] = [node for node in plan if node["Node Type"] == "Index Scan"]
        assert "user_id = $" in scan["Index Cond"]
        assert "ROW(created_at, id) < ROW(" in scan["Index Cond"]


def test_create_once_looks_at_the_oldest_keys_alone(full_table: psycopg.Connection[TupleRow]) -> None:
    """And finds its own through the constraint that makes keys unique."""
    plan = plan_of(full_table, "tasks/create_once", TASKS["tasks/create_once"].row_json)
    [oldest] = [node for node in plan if node.get("Index Name") == "idempotency_keys_oldest_first"]
    assert "created_at <" in oldest["Index Cond"]
    [insert] = [node for node in plan if node.get("Conflict Arbiter Indexes")]
    assert insert["Conflict Arbiter Indexes"] == ["idempotency_keys_pkey"]


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
