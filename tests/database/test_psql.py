"""The files of sql/tasks run with psql: the same rows as over REST, the same users kept apart."""

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

from tests.support.databases import new_database
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Create
from tests.support.psql import NULL, PSQLS, comparable, rows_of, run_psql
from todo_api.database import migrations, statements

TASK_FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("sql/tasks/*.sql"))
DATABASE_FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("sql/database/*.sql"))
INJECTION = "x'); DROP TABLE tasks; --"
# A carriage return only arrives unchanged where nothing reads psql's output as lines: not in these.
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
    """Give each psql in turn."""
    path: str = request.param
    return path


@pytest.fixture
def other_users_task(db: psycopg.Connection[TupleRow]) -> tuple[Any, ...]:
    """Give another user's task as its row."""
    row = db.execute("INSERT INTO tasks (user_id, title) VALUES ('other', 'Not yours') RETURNING *").fetchone()
    assert row
    return row


def shown(client: httpx.Client, task_id: int) -> dict[str, Any]:
    """Get a task over REST, comparable with psql's row."""
    response = client.get(f"/api/tasks/{task_id}")
    assert response.status_code == httpx.codes.OK, response.text
    return comparable(response.json())


def written(task: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a task what the database gave it."""
    return {name: value for name, value in task.items() if name not in {"id", "created_at", "updated_at"}}


def test_create_keeps_every_text_as_rest_does(
    psql: str, client: httpx.Client, create: Create, db: psycopg.Connection[TupleRow], conninfo: str
) -> None:
    for text in TEXTS:
        body = {"title": text, "description": text * 2, "completed": True}
        [created] = rows_of(conninfo, "create", psql, task=json.dumps(body, ensure_ascii=False))
        assert list(created.items()) == list(shown(client, created["id"]).items())
        assert written(created) == written(create(**body)) == {**body, "user_id": "local", "version": 1}
    assert db.execute("SELECT count(*) FROM tasks").fetchone() == (2 * len(TEXTS),)


def test_create_keeps_line_ends(psql: str, client: httpx.Client, conninfo: str) -> None:
    [created] = rows_of(conninfo, "create", psql, task=json.dumps({"title": "a\r\nb\rc\nd"}))
    assert shown(client, created["id"])["title"] == "a\r\nb\rc\nd"


@pytest.mark.parametrize("members", [{}, {"description": None}, {"description": ""}, {"description": NULL[1:-1]}])
def test_create_tells_absent_null_and_empty_apart(
    psql: str, members: dict[str, Any], client: httpx.Client, conninfo: str
) -> None:
    [created] = rows_of(conninfo, "create", psql, task=json.dumps({"title": "Buy milk", **members}))
    assert created["description"] == members.get("description") == shown(client, created["id"])["description"]


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
def test_update_does_what_patch_does(
    psql: str, changes: dict[str, Any], client: httpx.Client, create: Create, conninfo: str
) -> None:
    ours, theirs = (create("Buy milk", description="2 litres") for _ in range(2))
    patched = client.patch(f"/api/tasks/{theirs['id']}", json=changes).json()
    [updated] = rows_of(conninfo, "update", psql, task_id=ours["id"], changes=json.dumps(changes))
    before = written(ours)
    after = before | changes
    assert written(updated) == written(patched) == after | {"version": 1 if after == before else 2}
    assert list(updated.items()) == list(shown(client, ours["id"]).items())


def test_update_with_nothing_changes_nothing(psql: str, create: Create, conninfo: str) -> None:
    task = comparable(create(description=""))
    assert rows_of(conninfo, "update", psql, task_id=task["id"], changes="{}") == [task]


def test_toggle_does_what_the_toggle_call_does(psql: str, client: httpx.Client, create: Create, conninfo: str) -> None:
    task = create()
    for version in (2, 4):
        [toggled] = rows_of(conninfo, "toggle", psql, task_id=task["id"])
        assert (toggled["completed"], toggled["version"]) == (True, version)
        assert toggled == shown(client, task["id"])
        assert client.post(f"/api/tasks/{task['id']}/toggle").json()["completed"] is False


def test_get_shows_what_rest_shows(psql: str, client: httpx.Client, create: Create, conninfo: str) -> None:
    task = create(description="")
    assert rows_of(conninfo, "get", psql, task_id=task["id"]) == [shown(client, task["id"])]


def test_delete_shows_the_task_as_it_last_was(psql: str, client: httpx.Client, create: Create, conninfo: str) -> None:
    task = create()
    assert rows_of(conninfo, "delete", psql, task_id=task["id"]) == [comparable(task)]
    assert client.get(f"/api/tasks/{task['id']}").status_code == httpx.codes.NOT_FOUND


@pytest.mark.usefixtures("db")
def test_list_shows_what_rest_lists_up_to_its_limit(
    psql: str, client: httpx.Client, create: Create, conninfo: str
) -> None:
    assert rows_of(conninfo, "list", psql) == []
    for title in "abc":
        create(title)
    listed = [comparable(task) for task in client.get("/api/tasks").json()]
    assert [task["title"] for task in listed] == ["c", "b", "a"]
    assert rows_of(conninfo, "list", psql) == listed
    assert rows_of(conninfo, "list", psql, limit=2) == listed[:2]


def test_list_shows_50_tasks_unless_told(psql: str, db: psycopg.Connection[TupleRow], conninfo: str) -> None:
    db.execute("INSERT INTO tasks (user_id, title) SELECT 'local', n FROM generate_series(1, 60) AS n")
    assert [task["title"] for task in rows_of(conninfo, "list", psql)] == [str(n) for n in range(60, 10, -1)]
    assert len(rows_of(conninfo, "list", psql, limit=10_000)) == 60


@pytest.mark.parametrize("name", ["get", "update", "toggle", "delete"])
def test_a_task_that_is_not_there_is_no_row(psql: str, name: str, conninfo: str) -> None:
    extra = {"changes": '{"title": "a"}'} if name == "update" else {}
    assert rows_of(conninfo, name, psql, task_id=2**63 - 1, **extra) == []


def test_no_statement_sees_or_touches_another_users_task(
    psql: str, other_users_task: tuple[Any, ...], db: psycopg.Connection[TupleRow], conninfo: str
) -> None:
    task_id = other_users_task[0]
    for user in ({}, {"user_id": "third"}):
        assert rows_of(conninfo, "list", psql, **user) == []
        assert rows_of(conninfo, "get", psql, task_id=task_id, **user) == []
        assert rows_of(conninfo, "update", psql, task_id=task_id, changes='{"title": "Mine"}', **user) == []
        assert rows_of(conninfo, "toggle", psql, task_id=task_id, **user) == []
        assert rows_of(conninfo, "delete", psql, task_id=task_id, **user) == []
    assert db.execute("SELECT * FROM tasks").fetchall() == [other_users_task]


def test_each_statement_serves_the_user_that_it_is_given(
    psql: str, other_users_task: tuple[Any, ...], client: httpx.Client, conninfo: str
) -> None:
    task_id, other = other_users_task[0], "other"
    assert [task["id"] for task in rows_of(conninfo, "list", psql, user_id=other)] == [task_id]
    assert [task["user_id"] for task in rows_of(conninfo, "get", psql, user_id=other, task_id=task_id)] == [other]
    assert (
        rows_of(conninfo, "update", psql, user_id=other, task_id=task_id, changes='{"title": "a"}')[0]["version"] == 2
    )
    assert rows_of(conninfo, "toggle", psql, user_id=other, task_id=task_id)[0]["version"] == 3
    assert rows_of(conninfo, "create", psql, user_id=other, task='{"title": "a"}')[0]["user_id"] == other
    assert len(rows_of(conninfo, "delete", psql, user_id=other, task_id=task_id)) == 1
    assert client.get("/api/tasks").json() == []


@pytest.mark.parametrize("name", [Path(file).stem for file in TASK_FILES])
def test_a_value_never_becomes_sql(psql: str, name: str, db: psycopg.Connection[TupleRow], conninfo: str) -> None:
    db.execute("INSERT INTO tasks (user_id, title) VALUES ('local', 'Buy milk')")
    before = db.execute("SELECT * FROM tasks").fetchall()
    good = {
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
    texts = {"user_id", "idempotency_key", "q"}  # any value is one
    file = f"sql/tasks/{name}.sql"
    text = (ROOT / file).read_text(encoding="utf-8")
    for parameter in (parameter for parameter in good if f":'{parameter}'" in text):
        for value in (INJECTION, "1; DROP TABLE tasks", "\\'; DROP TABLE tasks; --", ":'user_id'"):
            done = run_psql(conninfo, file, {**good, parameter: value}, psql=psql)
            assert done.returncode == (0 if parameter in texts else 3), done.stderr
    created = {"create": 4, "create_once": 8}.get(name, 0)  # one for each text
    assert db.execute("DELETE FROM tasks WHERE user_id <> 'local' RETURNING title").fetchall() == [("a",)] * created
    assert db.execute("SELECT * FROM tasks").fetchall() == before


def head_of(file: str) -> list[str]:
    """Give the lines of the comment at a file's head, without their dashes."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("--").removeprefix(" ") for line in takewhile(lambda line: line.startswith("--"), lines)]


@pytest.mark.parametrize("file", TASK_FILES)
def test_the_head_of_a_file_names_its_parameters_and_its_file(file: str) -> None:
    head = head_of(file)
    parameters = statements.load()[file.removeprefix("sql/").removesuffix(".sql")].parameters
    types = ("bigint", "bigint[]", "integer", "jsonb", "text")
    assert {line.split()[0] for line in head if len(line.split()) > 1 and line.split()[1] in types} == parameters
    assert head[0].endswith(".") or head[1].endswith(".")
    assert head[-1].startswith("psql -X -v ON_ERROR_STOP=1 ")
    assert head[-1].endswith(f'-f {file} "$DATABASE_URL"')


@pytest.fixture(scope="module")
def own_database(conninfo: str) -> Iterator[str]:
    """Give the connection string of a database of these tests' own, where ids can be chosen."""
    with new_database(conninfo) as database:
        migrations.apply(database)
        yield database


def run_line_of(file: str, psql: str, conninfo: str) -> subprocess.CompletedProcess[str]:
    """Run the psql line in a file's head as it is written there."""
    head = head_of(file)
    [start] = [number for number, line in enumerate(head) if line.startswith("psql ")]
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
def test_the_psql_line_in_the_head_of_a_file_runs_as_it_is_written(psql: str, file: str, own_database: str) -> None:
    with psycopg.connect(own_database) as connection:
        connection.execute("DELETE FROM tasks")
        connection.execute("DELETE FROM idempotency_keys")
        connection.execute(
            "INSERT INTO tasks (id, user_id, title) OVERRIDING SYSTEM VALUE VALUES (1, 'local', 'Buy milk')"
        )
        connection.execute("ALTER TABLE tasks ALTER id RESTART WITH 2")
    done = run_line_of(file, psql, own_database)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("| a " if "create_once" in file else "Buy milk") in done.stdout
    assert "(1 row)" in done.stdout


@pytest.mark.parametrize("file", DATABASE_FILES)
def test_the_psql_line_in_the_head_of_a_file_about_the_database_runs(psql: str, file: str, own_database: str) -> None:
    done = run_line_of(file, psql, own_database)
    assert (done.returncode, "ERROR" in done.stderr) == (0, False), done.stderr
