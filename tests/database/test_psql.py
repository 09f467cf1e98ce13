"""The files of sql/tasks, run with psql: they return the same rows as the API, and separate the users."""

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.databases import administrator, migrate, new_database
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Create
from tests.support.psql import NULL, PSQLS, comparable, rows_of, run_psql
from todo_api.database import statements

TASK_FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("sql/tasks/*.sql"))
DATABASE_FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("sql/database/*.sql"))
INJECTION = "x'); DROP TABLE tasks; --"
# These have no carriage return, because Python converts line endings when it reads psql's output.
TEXTS = [
    "it's \"quoted\" \\ back\\slashed \\n \\' ''",
    "100 % %s %(task)s %%",
    ":x :'x' :\"x\" ::text :{?x}",
    "$$ $1 $tag$ ; -- /* no comment */",
    "\U0001f600 e\u0301 \u00e9 \u202e\u200d \U0010fffd \ufeff",
    "  trailing and leading  ",
    "two\nlines\tand\ttabs\n",
    NULL[1:-1],
    INJECTION,
]


@pytest.fixture(params=PSQLS)
def psql(request: pytest.FixtureRequest) -> str:
    """Return the path of a psql. Each test runs once with every psql."""
    path: str = request.param
    return path


@pytest.fixture
def other_users_task(db: psycopg.Connection[TupleRow]) -> tuple[Any, ...]:
    """Store a task of another user and return its row."""
    row = db.execute("INSERT INTO tasks (user_id, title) VALUES ('other', 'Not yours') RETURNING *").fetchone()
    assert row
    return row


def api_task(client: httpx.Client, task_id: int) -> dict[str, Any]:
    """Return a task from the API, comparable with a row from psql."""
    response = client.get(f"/api/tasks/{task_id}")
    assert response.status_code == httpx.codes.OK, response.text
    return comparable(response.json())


def without_generated_fields(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task without the fields whose values the database generates."""
    return {name: value for name, value in task.items() if name not in {"id", "created_at", "updated_at"}}


def test_create_stores_every_text_as_the_api_does(
    psql: str, client: httpx.Client, create: Create, db: psycopg.Connection[TupleRow], conninfo: str
) -> None:
    for text in TEXTS:
        body = {"title": text, "description": text * 2, "completed": True}
        [created] = rows_of(conninfo, "create", psql, task=json.dumps(body, ensure_ascii=False))
        assert list(created.items()) == list(api_task(client, created["id"]).items())
        assert (
            without_generated_fields(created)
            == without_generated_fields(create(**body))
            == {**body, "user_id": "local", "version": 1}
        )
    assert db.execute("SELECT count(*) FROM tasks").fetchone() == (2 * len(TEXTS),)


def test_create_stores_line_endings_unchanged(psql: str, client: httpx.Client, conninfo: str) -> None:
    [created] = rows_of(conninfo, "create", psql, task=json.dumps({"title": "a\r\nb\rc\nd"}))
    assert api_task(client, created["id"])["title"] == "a\r\nb\rc\nd"


@pytest.mark.parametrize("fields", [{}, {"description": None}, {"description": ""}, {"description": NULL[1:-1]}])
def test_create_distinguishes_absent_null_and_empty_descriptions(
    psql: str, fields: dict[str, Any], client: httpx.Client, conninfo: str
) -> None:
    [created] = rows_of(conninfo, "create", psql, task=json.dumps({"title": "Buy milk", **fields}))
    assert created["description"] == fields.get("description") == api_task(client, created["id"])["description"]


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "Buy bread"},
        {"completed": True},
        {"description": None},
        {"description": ""},
        {"title": INJECTION, "description": "%s :x \\ \U0001f600", "completed": True},
        {"title": "Buy milk", "description": "2 litres", "completed": False},
        {},
    ],
)
def test_update_behaves_like_patch(
    psql: str, changes: dict[str, Any], client: httpx.Client, create: Create, conninfo: str
) -> None:
    task_to_update, task_to_patch = (create("Buy milk", description="2 litres") for _ in range(2))
    patched = client.patch(f"/api/tasks/{task_to_patch['id']}", json=changes).json()
    [updated] = rows_of(conninfo, "update", psql, task_id=task_to_update["id"], changes=json.dumps(changes))
    before = without_generated_fields(task_to_update)
    after = before | changes
    assert (
        without_generated_fields(updated)
        == without_generated_fields(patched)
        == after | {"version": 1 if after == before else 2}
    )
    assert list(updated.items()) == list(api_task(client, task_to_update["id"]).items())


def test_update_without_a_field_changes_nothing(psql: str, create: Create, conninfo: str) -> None:
    task = comparable(create(description=""))
    assert rows_of(conninfo, "update", psql, task_id=task["id"], changes="{}") == [task]


def test_toggle_behaves_like_the_toggle_call(psql: str, client: httpx.Client, create: Create, conninfo: str) -> None:
    task = create()
    for version in (2, 4):
        [toggled] = rows_of(conninfo, "toggle", psql, task_id=task["id"])
        assert (toggled["completed"], toggled["version"]) == (True, version)
        assert toggled == api_task(client, task["id"])
        assert client.post(f"/api/tasks/{task['id']}/toggle").json()["completed"] is False


def test_get_returns_the_same_task_as_the_api(psql: str, client: httpx.Client, create: Create, conninfo: str) -> None:
    task = create(description="")
    assert rows_of(conninfo, "get", psql, task_id=task["id"]) == [api_task(client, task["id"])]


def test_delete_returns_the_deleted_task(psql: str, client: httpx.Client, create: Create, conninfo: str) -> None:
    task = create()
    assert rows_of(conninfo, "delete", psql, task_id=task["id"]) == [comparable(task)]
    assert client.get(f"/api/tasks/{task['id']}").status_code == httpx.codes.NOT_FOUND


@pytest.mark.usefixtures("db")
def test_list_returns_the_same_tasks_as_the_api_up_to_its_limit(
    psql: str, client: httpx.Client, create: Create, conninfo: str
) -> None:
    assert rows_of(conninfo, "list", psql) == []
    for title in "abc":
        create(title)
    listed = [comparable(task) for task in client.get("/api/tasks").json()]
    assert [task["title"] for task in listed] == ["c", "b", "a"]
    assert rows_of(conninfo, "list", psql) == listed
    assert rows_of(conninfo, "list", psql, limit=2) == listed[:2]


def test_list_returns_50_tasks_by_default(psql: str, db: psycopg.Connection[TupleRow], conninfo: str) -> None:
    db.execute("INSERT INTO tasks (user_id, title) SELECT 'local', n FROM generate_series(1, 60) AS n")
    assert [task["title"] for task in rows_of(conninfo, "list", psql)] == [str(n) for n in range(60, 10, -1)]
    assert len(rows_of(conninfo, "list", psql, limit=10_000)) == 60


@pytest.mark.parametrize("name", ["get", "update", "toggle", "delete"])
def test_a_missing_task_returns_no_row(psql: str, name: str, conninfo: str) -> None:
    extra = {"changes": '{"title": "a"}'} if name == "update" else {}
    assert rows_of(conninfo, name, psql, task_id=2**63 - 1, **extra) == []


def test_no_statement_returns_or_changes_a_task_of_another_user(
    psql: str, other_users_task: tuple[Any, ...], db: psycopg.Connection[TupleRow], conninfo: str
) -> None:
    task_id = other_users_task[0]
    for user_parameter in ({}, {"user_id": "third"}):
        assert rows_of(conninfo, "list", psql, **user_parameter) == []
        assert rows_of(conninfo, "get", psql, task_id=task_id, **user_parameter) == []
        assert rows_of(conninfo, "update", psql, task_id=task_id, changes='{"title": "Mine"}', **user_parameter) == []
        assert rows_of(conninfo, "toggle", psql, task_id=task_id, **user_parameter) == []
        assert rows_of(conninfo, "delete", psql, task_id=task_id, **user_parameter) == []
    assert db.execute("SELECT * FROM tasks").fetchall() == [other_users_task]


def test_each_statement_uses_the_given_user(
    psql: str, other_users_task: tuple[Any, ...], client: httpx.Client, conninfo: str
) -> None:
    task_id, user_id = other_users_task[0], "other"
    assert [task["id"] for task in rows_of(conninfo, "list", psql, user_id=user_id)] == [task_id]
    assert [task["user_id"] for task in rows_of(conninfo, "get", psql, user_id=user_id, task_id=task_id)] == [user_id]
    assert (
        rows_of(conninfo, "update", psql, user_id=user_id, task_id=task_id, changes='{"title": "a"}')[0]["version"] == 2
    )
    assert rows_of(conninfo, "toggle", psql, user_id=user_id, task_id=task_id)[0]["version"] == 3
    assert rows_of(conninfo, "create", psql, user_id=user_id, task='{"title": "a"}')[0]["user_id"] == user_id
    assert len(rows_of(conninfo, "delete", psql, user_id=user_id, task_id=task_id)) == 1
    assert client.get("/api/tasks").json() == []


@pytest.mark.parametrize("name", [Path(file).stem for file in TASK_FILES])
def test_a_value_never_becomes_sql(psql: str, name: str, db: psycopg.Connection[TupleRow], conninfo: str) -> None:
    db.execute("INSERT INTO tasks (user_id, title) VALUES ('local', 'Buy milk')")
    before = db.execute("SELECT * FROM tasks").fetchall()
    valid_values = {
        "task": '{"title": "a"}',
        "changes": "{}",
        "task_id": 1,
        "if_match": "{1}",
        "user_id": "nobody",
        "idempotency_key": "one",
        "limit": 1,
        "completed": "true",
        "q": "",
        "after": "0_1",
    }
    text_parameters = {"user_id", "idempotency_key", "q"}  # any value is valid
    file = f"sql/tasks/{name}.sql"
    text = (ROOT / file).read_text(encoding="utf-8")
    for parameter in (parameter for parameter in valid_values if f":'{parameter}'" in text):
        for value in (INJECTION, "1; DROP TABLE tasks", "\\'; DROP TABLE tasks; --", ":'user_id'"):
            result = run_psql(conninfo, file, {**valid_values, parameter: value}, psql=psql)
            assert result.returncode == (0 if parameter in text_parameters else 3), result.stderr
    created = {"create": 4, "create_once": 8}.get(name, 0)  # one task for each value of a text parameter
    assert db.execute("DELETE FROM tasks WHERE user_id <> 'local' RETURNING title").fetchall() == [("a",)] * created
    assert db.execute("SELECT * FROM tasks").fetchall() == before


def head_comment(file: str) -> list[str]:
    """Return the lines of the comment at the head of a file, without their dashes."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("--").removeprefix(" ") for line in takewhile(lambda line: line.startswith("--"), lines)]


@pytest.mark.parametrize("file", TASK_FILES)
def test_the_head_comment_of_a_file_lists_its_parameters_and_its_psql_line(file: str) -> None:
    head = head_comment(file)
    parameters = statements.load()[file.removeprefix("sql/").removesuffix(".sql")].parameters
    types = ("bigint", "bigint[]", "integer", "jsonb", "text")
    assert {line.split()[0] for line in head if len(line.split()) > 1 and line.split()[1] in types} == set(parameters)
    assert head[0].endswith(".") or head[1].endswith(".")
    assert head[-1].startswith("psql -X -v ON_ERROR_STOP=1 ")
    assert head[-1].endswith(f'-f {file} "$DATABASE_URL"')


@pytest.fixture(scope="module")
def own_database(conninfo: str) -> Iterator[str]:
    """Return the connection string of a database in which these tests may choose ids."""
    with new_database(conninfo) as database:
        migrate(database)
        yield database


def run_psql_line(file: str, psql: str, conninfo: str) -> subprocess.CompletedProcess[str]:
    """Run the psql line in the head comment of a file, unchanged."""
    head = head_comment(file)
    [start] = [index for index, line in enumerate(head) if line.startswith("psql ")]
    path = f"{Path(psql).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-c", "\n".join(head[start:])],
        cwd=ROOT,
        env=environment(DATABASE_URL=conninfo, PATH=path),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("file", TASK_FILES)
def test_the_psql_line_of_a_task_file_runs_as_it_is_written(psql: str, file: str, own_database: str) -> None:
    with psycopg.connect(own_database) as connection:
        connection.execute("DELETE FROM tasks")
        connection.execute("DELETE FROM idempotency_keys")
        connection.execute(
            "INSERT INTO tasks (id, user_id, title) OVERRIDING SYSTEM VALUE VALUES (1, 'local', 'Buy milk')"
        )
        connection.execute("ALTER TABLE tasks ALTER id RESTART WITH 2")
    result = run_psql_line(file, psql, own_database)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("| a " if "create_once" in file else "Buy milk") in result.stdout
    assert "(1 row)" in result.stdout


@pytest.mark.parametrize("file", DATABASE_FILES)
def test_the_psql_line_of_a_database_file_runs_as_it_is_written(psql: str, file: str, own_database: str) -> None:
    conninfo = administrator(own_database) if "reload" in file else own_database
    result = run_psql_line(file, psql, conninfo)
    if "shared_out" in file:
        assert 'relation "pg_dist_partition" does not exist' in result.stderr  # only Citus has this catalog
    else:
        assert (result.returncode, "ERROR" in result.stderr) == (0, False), result.stderr
