"""The tables can be shared out by user: each statement needs the rows of one user only, which are in one place.

Citus shares tables out over servers, and is in no package registry. Partitions by the hash of the user are PostgreSQL's
own way, within one server. What Citus demands beyond that is checked in the statements themselves.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.database.test_plans import LOADED, TASK_STATEMENTS, acting_as, plan_of
from tests.support.databases import PARTITIONS, TABLES, migrate, new_database
from tests.support.environment import ROOT
from todo_api.database import statements

TESTS = [
    *(f"tests/api/test_{name}.py" for name in ("tasks", "pages", "conditions", "idempotency", "concurrency")),
    *(
        f"tests/database/test_{name}.py"
        for name in ("abandoned_keys", "constraints", "isolation", "psql", "row_level_security")
    ),
]
OF_ONE_USER = {**TASK_STATEMENTS, "database/clear_abandoned_keys": LOADED["database/clear_abandoned_keys"]}
JSON_FORMS = [(name, "rows_json" if name == "tasks/list" else "row_json") for name in TASK_STATEMENTS]
TEXTS = {name: (statements.SQL / f"{name}.sql").read_text(encoding="utf-8") for name in OF_ONE_USER}
FILL = """
    INSERT INTO tasks (user_id, title, completed, created_at)
    SELECT 'user ' || n % 50, 'Task ' || n, n % 50 <> 0, now() - n * interval '10 seconds'
    FROM generate_series(1, 50000) AS n;
    INSERT INTO idempotency_keys (user_id, key, task, task_id, created_at)
    SELECT 'user ' || n % 50, 'key ' || n, '{"title": "a"}', n, now() - n * interval '1 minute'
    FROM generate_series(1, 20000) AS n;
    ANALYZE tasks, idempotency_keys
"""


def test_the_tests_of_the_statements_pass_with_partitioned_tables(tmp_path: Path) -> None:
    # Without a folder of its own, this pytest would change the modes of the folders of the one that runs it.
    options = ["-n", "0", "-k", "not 32_threads", f"--basetemp={tmp_path / 'tests'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *TESTS],
        cwd=ROOT,
        env=os.environ | {"TEST_PARTITIONED": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture(scope="module")
def filled(conninfo: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return a connection to a database with partitioned tables of 50 users, which plans as the service's do."""
    with new_database(conninfo) as database:
        migrate(database, partitioned=True)
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(FILL)
            connection.execute("SET plan_cache_mode = force_generic_plan")
            yield connection


@pytest.fixture(params=["owner", "role"])
def shared_out(
    request: pytest.FixtureRequest, filled: psycopg.Connection[TupleRow]
) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return the connection as the tables' owner, and as the role for which row-level security holds."""
    with acting_as(request.param, filled) as connection:
        yield connection


@pytest.mark.parametrize(("name", "query"), [*((name, "rows") for name in OF_ONE_USER), *JSON_FORMS])
def test_each_statement_reads_one_partition_of_each_table_through_an_index(
    name: str, query: str, shared_out: psycopg.Connection[TupleRow]
) -> None:
    plan = plan_of(shared_out, name, getattr(OF_ONE_USER[name], query))
    scans = [node for node in plan if "Relation Name" in node and "Scan" in node["Node Type"]]
    assert bool(scans) == (name != "tasks/create")
    assert {scan["Node Type"] for scan in scans} <= {"Index Scan", "Bitmap Heap Scan"}
    for table in TABLES:
        assert len({scan["Relation Name"] for scan in scans if scan["Relation Name"].startswith(f"{table}_")}) <= 1
    for scan in scans:
        condition = scan.get("Index Cond") or scan["Recheck Cond"]
        assert "user_id = $" in condition, "the plan is made for certain values, or reads the rows of other users"
    removed = sum(node.get("Subplans Removed", 0) for node in plan)
    assert removed == (PARTITIONS - 1) * len(scans)
    assert not [node["Node Type"] for node in plan if "Sort" in node["Node Type"]]


def test_each_key_begins_with_the_user(filled: psycopg.Connection[TupleRow]) -> None:
    keys = """
        SELECT tables.relname, columns.attname
        FROM pg_index AS keys
        JOIN pg_class AS tables ON tables.oid = keys.indrelid
        JOIN pg_attribute AS columns ON columns.attrelid = tables.oid AND columns.attnum = keys.indkey[0]
        WHERE keys.indisunique AND tables.relname = ANY (%s)
        ORDER BY tables.relname
    """
    assert filled.execute(keys, [list(TABLES)]).fetchall() == [(table, "user_id") for table in sorted(TABLES)]


# ---- What Citus demands beyond that


def expressions(connection: psycopg.Connection[TupleRow], name: str) -> list[str]:
    """Return all nodes of the tree that PostgreSQL makes of a statement, as texts; a node contains those below it.

    PostgreSQL shows the tree of a function's body.
    """
    statement = OF_ONE_USER[name]
    parameters = ", ".join("text" for _ in statement.parameters)
    body = statement.rows.decode()
    with connection.transaction(force_rollback=True):
        connection.execute(f"CREATE FUNCTION tree({parameters}) RETURNS void BEGIN ATOMIC {body}; END".encode())
        row = connection.execute("SELECT prosqlbody::text FROM pg_proc WHERE proname = 'tree'").fetchone()
    assert row
    tree: str = row[0]
    found, starts = [], []
    for brace in re.finditer(r"(?<!\\)[{}]", tree):
        if brace[0] == "{":
            starts.append(brace.start())
        else:
            found.append(tree[starts.pop() : brace.end()])
    assert len(found) > 10
    return found


@pytest.mark.parametrize("name", OF_ONE_USER)
def test_no_function_of_a_column_depends_on_the_session_or_changes_its_result(
    name: str, filled: psycopg.Connection[TupleRow]
) -> None:
    """Citus rejects such a function in SET. There is none elsewhere either."""
    of_columns = [expression for expression in expressions(filled, name) if "{VAR " in expression]
    called = {
        int(function[1])
        for expression in of_columns
        if (function := re.match(r"\{\w+ (?::opno \d+ )?:(?:funcid|opfuncid) (\d+) ", expression))
    }
    functions = "SELECT oid::regprocedure::text FROM pg_proc WHERE oid = ANY (%s) AND provolatile <> 'i'"
    assert filled.execute(functions, [list(called)]).fetchall() == []
    assert called
    # Such a conversion calls functions that the tree does not name.
    assert not [expression for expression in of_columns if expression.startswith("{COERCEVIAIO ")]


def test_that_test_notices_such_a_function(
    filled: psycopg.Connection[TupleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_zone = "(updated_at AT TIME ZONE 'UTC' + interval '1 microsecond') AT TIME ZONE 'UTC'"
    text = TEXTS["tasks/toggle"]
    assert of_zone in text
    for changed in ("updated_at + interval '1 microsecond'", "updated_at::text::timestamptz"):
        monkeypatch.setitem(OF_ONE_USER, "tasks/toggle", statements.parse("", text.replace(of_zone, changed)))
        with pytest.raises(AssertionError):
            test_no_function_of_a_column_depends_on_the_session_or_changes_its_result("tasks/toggle", filled)


@pytest.mark.parametrize("name", OF_ONE_USER)
def test_only_rows_of_the_caller_are_locked(name: str) -> None:
    for part in re.findall(r"\(\s*SELECT\b(?:(?!\(\s*SELECT\b).)*?FOR (?:UPDATE|SHARE)", TEXTS[name], re.DOTALL):
        assert "old.user_id = :'user_id'::text" in part
    assert len(re.findall("FOR (?:UPDATE|SHARE|NO KEY|KEY)", TEXTS[name])) == (
        1 if name in {"tasks/create_once", "database/clear_abandoned_keys"} else 0
    )


@pytest.mark.parametrize("name", OF_ONE_USER)
def test_each_insert_names_the_user_by_the_parameter_itself(name: str) -> None:
    inserts = re.findall(r"INSERT INTO (\w+).*?SELECT\b(.*?)\bFROM\b", TEXTS[name], re.DOTALL)
    assert len(inserts) == TEXTS[name].count("INSERT INTO")
    for table, selected in inserts:
        assert table in TABLES
        assert ":'user_id'::text AS user_id" in selected


def test_no_policy_has_a_sub_select(filled: psycopg.Connection[TupleRow]) -> None:
    policies = "SELECT polqual::text, polwithcheck::text FROM pg_policy WHERE polrelid = ANY (%s::regclass[])"
    found = filled.execute(policies, [list(TABLES)]).fetchall()
    assert len(found) == len(TABLES)
    assert "SUBLINK" not in str(found)
