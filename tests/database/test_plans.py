"""The plans of the statements with a million tasks: they use the indexes, for all values of the parameters."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import TupleRow

from tests.support.databases import new_database
from todo_api.database import ensure_role, migrations, statements

LOADED = statements.load()
TASK_STATEMENTS = {name: statement for name, statement in LOADED.items() if name.startswith("tasks/")}
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
PRIMARY_KEY = {"tasks_pkey"}
NEWEST_FIRST, OPEN_NEWEST_FIRST = "tasks_newest_first", "tasks_open_newest_first"
INDEXES = {
    "tasks/create": set(),
    "tasks/create_once": {"idempotency_keys_of_user_oldest_first", "idempotency_keys_pkey"},
    "tasks/delete": PRIMARY_KEY,
    "tasks/get": PRIMARY_KEY,
    "tasks/list": {NEWEST_FIRST, OPEN_NEWEST_FIRST},
    "tasks/toggle": PRIMARY_KEY,
    "tasks/update": PRIMARY_KEY,
}
LIST_PARAMETERS = [
    {"completed": completed, "q": q, "after": after, "limit": limit}
    for completed, q, after, limit in product(
        ["", "true", "false"], ["", "milk"], ["253402300800000000_1", PARAMETERS["after"]], ["2", "10001"]
    )
]


@pytest.fixture(scope="module")
def filled(conninfo: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return a connection to a database in which one user has a million completed tasks, and 200 open ones."""
    with new_database(conninfo) as database:
        migrations.apply(database)
        ensure_role(database, "todo_app", pooler=False, owner=database)
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(
                """
                INSERT INTO tasks (user_id, title, completed, created_at, updated_at)
                SELECT
                    CASE WHEN n % 11 = 0 THEN 'user ' || n % 50 + 10 ELSE 'user 3' END,
                    'Task ' || n,
                    n % 5500 <> 3,
                    now() - n * interval '10 seconds',
                    now()
                FROM generate_series(1, 1100220) AS n
                """
            )
            connection.execute(
                """
                INSERT INTO idempotency_keys (user_id, key, task, task_id, created_at)
                SELECT
                    CASE WHEN n % 2 = 0 THEN 'user 3' ELSE 'single ' || n / 10 END,
                    'key ' || n,
                    '{"title": "a"}',
                    n,
                    now() - n * interval '1 second'
                FROM generate_series(1, 80000) AS n -- 22 hours; older ones are soon cleared
                """
            )
            connection.execute("VACUUM ANALYZE tasks, idempotency_keys")
            connection.execute("SET plan_cache_mode = force_generic_plan")  # as in the connections of the service
            yield connection


@contextmanager
def acting_as(who: str, connection: psycopg.Connection[TupleRow]) -> Iterator[psycopg.Connection[TupleRow]]:
    """Let a connection act as the tables' owner, or as the role for which row-level security holds."""
    if who == "role":
        connection.execute(sql.SQL("SET todo.user_id = {}").format(PARAMETERS["user_id"]))
        connection.execute("SET ROLE todo_app")
        assert connection.execute(statements.load()["database/isolation"].rows).fetchall() == [(True,)]
    yield connection
    connection.execute("RESET ROLE")


@pytest.fixture(params=["owner", "role"])
def full_table(
    request: pytest.FixtureRequest, filled: psycopg.Connection[TupleRow]
) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return the connection as either of them."""
    with acting_as(request.param, filled) as connection:
        yield connection


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every node of a plan, without the parts that the values exclude: they read nothing."""
    if not is_excluded(plan):
        yield plan
        for child in plan.get("Plans", []):
            yield from nodes(child)


def is_excluded(plan: dict[str, Any]) -> bool:
    """Return whether a part of a plan has no rows, whatever the tables have."""
    return plan.get("One-Time Filter") == "false" or ("Plans" in plan and all(map(is_excluded, plan["Plans"])))


def plan_of(
    connection: psycopg.Connection[TupleRow],
    name: str,
    text: bytes,
    values: dict[str, str] = PARAMETERS,
    options: str = "FORMAT JSON",
) -> list[dict[str, Any]]:
    """Return the nodes of the generic plan of a statement, which PostgreSQL makes without the parameters' values."""
    connection.execute(b"PREPARE statement AS " + text)
    literals = sql.SQL(", ").join(sql.Literal(values[parameter]) for parameter in LOADED[name].parameters)
    arguments = sql.SQL("({})").format(literals) if LOADED[name].parameters else sql.SQL("")
    explain = sql.SQL("EXPLAIN ({}) EXECUTE statement {}").format(sql.SQL(options), arguments)
    explained = connection.execute(explain).fetchone()
    connection.execute("DEALLOCATE statement")
    assert explained
    return list(nodes(explained[0][0]["Plan"]))


def read_by(connection: psycopg.Connection[TupleRow], values: dict[str, str]) -> tuple[list[dict[str, Any]], int]:
    """Run the list, and return its scans that read something, and the number of blocks that all of it read."""
    text, options = LOADED["tasks/list"].rows_json, "ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON"
    plan = plan_of(connection, "tasks/list", text, PARAMETERS | values, options)
    scans = [node for node in plan if "Scan" in node["Node Type"] and node.get("Actual Loops") and "Index Name" in node]
    return scans, plan[0]["Shared Hit Blocks"] + plan[0]["Shared Read Blocks"]


def assert_reads_through_an_index(plan: list[dict[str, Any]]) -> None:
    """Check that a plan does not sort, scans tables only through an index, and is generic."""
    assert not [node["Node Type"] for node in plan if "Sort" in node["Node Type"]]
    scans = [node for node in plan if "Relation Name" in node and "Scan" in node["Node Type"]]
    assert {node["Node Type"] for node in scans} <= {"Index Scan"}
    with_values = [node for node in scans if node["Relation Name"] == "tasks" and "$" not in node["Index Cond"]]
    assert not with_values, "the plan was made for certain values of the parameters"


@pytest.mark.parametrize("name", TASK_STATEMENTS)
def test_each_statement_finds_tasks_through_an_index(name: str, full_table: psycopg.Connection[TupleRow]) -> None:
    plan = plan_of(full_table, name, TASK_STATEMENTS[name].rows)
    assert_reads_through_an_index(plan)
    used = {node["Index Name"] for node in plan if "Index Name" in node}
    assert used == INDEXES[name]


@pytest.mark.parametrize("values", LIST_PARAMETERS, ids=str)
def test_a_page_is_read_from_the_index_in_order_starting_at_its_cursor(
    values: dict[str, str], full_table: psycopg.Connection[TupleRow]
) -> None:
    for text in (TASK_STATEMENTS["tasks/list"].rows, TASK_STATEMENTS["tasks/list"].rows_json):
        plan = plan_of(full_table, "tasks/list", text, PARAMETERS | values)
        assert_reads_through_an_index(plan)
        scans = [node for node in plan if node["Node Type"] == "Index Scan"]
        assert {scan["Index Name"] for scan in scans} == {NEWEST_FIRST, OPEN_NEWEST_FIRST}
        for scan in scans:
            assert "user_id = $" in scan["Index Cond"]
            assert "ROW(created_at, id) < ROW(" in scan["Index Cond"]


@pytest.mark.parametrize("after", ["253402300800000000_1", "the middle"])
def test_a_page_of_open_tasks_among_a_million_completed_ones_reads_no_more_than_a_page(
    after: str, full_table: psycopg.Connection[TupleRow]
) -> None:
    if after == "the middle":
        row = full_table.execute(MIDDLE).fetchone()
        assert row
        after = row[0]
    pages = [read_by(full_table, {"completed": completed, "q": "", "after": after}) for completed in ("", "false")]
    for scans, _ in pages:
        assert sum(scan["Actual Rows"] for scan in scans) == 50
        assert sum(scan.get("Rows Removed by Filter", 0) for scan in scans) == 0
    # The blocks of the open tasks are far apart, one for each task.
    assert pages[1][1] < pages[0][1] + 60


MIDDLE = """
    SELECT (extract(epoch FROM created_at) * 1000000)::bigint || '_' || id FROM tasks
    WHERE user_id = 'user 3' AND NOT completed
    ORDER BY created_at DESC, id DESC OFFSET 100 LIMIT 1
"""


def test_create_once_reads_only_the_oldest_keys_of_its_user_and_its_own(
    full_table: psycopg.Connection[TupleRow],
) -> None:
    plan = plan_of(full_table, "tasks/create_once", TASK_STATEMENTS["tasks/create_once"].row_json)
    [oldest] = [node for node in plan if node.get("Index Name") == "idempotency_keys_of_user_oldest_first"]
    assert "user_id = $" in oldest["Index Cond"]
    assert "created_at <" in oldest["Index Cond"]
    # It finds its own key through the constraint that makes keys unique.
    [insert] = [node for node in plan if node.get("Conflict Arbiter Indexes")]
    assert insert["Conflict Arbiter Indexes"] == ["idempotency_keys_pkey"]


def test_old_keys_of_all_users_are_found_through_their_index(filled: psycopg.Connection[TupleRow]) -> None:
    plan = plan_of(filled, "database/abandoned_keys", LOADED["database/abandoned_keys"].rows)
    assert [node.get("Index Name") for node in plan] == [None, "idempotency_keys_abandoned"]
    plan = plan_of(filled, "database/clear_abandoned_keys", LOADED["database/clear_abandoned_keys"].rows)
    assert {node["Index Name"] for node in plan if "Index Name" in node} == INDEXES["tasks/create_once"]


def test_the_readiness_check_reads_no_rows(full_table: psycopg.Connection[TupleRow]) -> None:
    plan = plan_of(full_table, "database/ready", LOADED["database/ready"].rows)
    scans = [node for node in plan if "Relation Name" in node]
    assert {scan["Node Type"] for scan in scans} <= {"Index Scan", "Index Only Scan"}
    assert all("user_id = ''" in scan["Index Cond"] for scan in scans)


@pytest.mark.parametrize("name", TASK_STATEMENTS)
def test_the_json_form_of_each_statement_uses_an_index_too(name: str, full_table: psycopg.Connection[TupleRow]) -> None:
    wrapped = TASK_STATEMENTS[name].rows_json if name == "tasks/list" else TASK_STATEMENTS[name].row_json
    assert_reads_through_an_index(plan_of(full_table, name, wrapped))


@pytest.mark.parametrize("name", TASK_STATEMENTS)
def test_each_statement_uses_an_index_in_psql_too(name: str, full_table: psycopg.Connection[TupleRow]) -> None:
    # psql inserts the values into the text.
    statement = TASK_STATEMENTS[name]
    values = [sql.Literal(PARAMETERS[parameter]).as_string() for parameter in statement.parameters]
    text = re.sub(r"\$(\d+)", lambda match: values[int(match[1]) - 1], statement.rows.decode())
    explained = full_table.execute(f"EXPLAIN (FORMAT JSON) {text}".encode()).fetchone()
    assert explained
    types = {node["Node Type"] for node in nodes(explained[0][0]["Plan"])}
    assert types.isdisjoint({"Seq Scan", "Sort", "Incremental Sort"}), explained
