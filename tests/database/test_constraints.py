"""psql accepts and rejects the same input as the API. One list of cases tests both."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.rows import TupleRow

from tests.support.fixtures import Create
from tests.support.psql import run_psql
from todo_api.embedded import programs

PSQL = str(programs.find(None).folder / "psql")  # one psql is enough: the server checks the constraints
WHITE_SPACE = [character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()]
LAST_CODE_POINT = chr(sys.maxunicode)

VALID_TITLES = {
    "one character": "a",
    "200 characters": "a" * 200,
    "200 astral characters": "\U0001f600" * 200,
    "200 combining characters": "\u0301" * 200,
    "white space around a letter": "".join(WHITE_SPACE) + "a" + "".join(WHITE_SPACE),
    "zero-width space": "\u200b",
    "byte order mark": "\ufeff",
    "mongolian vowel separator": "\u180e",
    "control character": "\x01",
    "delete": "\x7f",
    "noncharacters": "\uffff" + LAST_CODE_POINT,
    "right-to-left override": "\u202e",
}
INVALID_TITLES = {
    "empty": "",
    "201 characters": "a" * 201,
    "201 astral characters": "\U0001f600" * 201,
    "201 white space characters": " " * 201,
    "all white space": "".join(WHITE_SPACE),
    **{f"only U+{ord(character):04X}": character for character in WHITE_SPACE},
}
INVALID_CHANGES: dict[str, dict[str, Any]] = {
    **{f"title: {name}": {"title": title} for name, title in INVALID_TITLES.items()},
    "title: null": {"title": None},
    "title: number": {"title": 1},
    "title: boolean": {"title": True},
    "title: array": {"title": ["a"]},
    "title: object": {"title": {"title": "a"}},
    "description: 2001 characters": {"description": "a" * 2001},
    "description: 2001 astral characters": {"description": "\U0001f600" * 2001},
    "description: number": {"description": 0},
    "description: boolean": {"description": False},
    "description: array": {"description": []},
    "description: object": {"description": {}},
    "completed: yes": {"completed": "yes"},
    "completed: true as a string": {"completed": "true"},
    "completed: 1": {"completed": 1},
    "completed: 0": {"completed": 0},
    "completed: null": {"completed": None},
    "completed: array": {"completed": [True]},
    **{
        f"field: {name}": {name: value}
        for name, value in {
            "id": 1,
            "user_id": "local",
            "version": 1,
            "created_at": "2026-01-11T09:30:00Z",
            "updated_at": "2026-01-11T09:30:00Z",
            "colour": None,
            "": "",
            "Title": "a",
        }.items()
    },
}
VALID_CHANGES: dict[str, dict[str, Any]] = {
    **{f"title: {name}": {"title": title} for name, title in VALID_TITLES.items()},
    "description: null": {"description": None},
    "description: empty": {"description": ""},
    "description: white space": {"description": "".join(WHITE_SPACE)},
    "description: 2000 characters": {"description": "a" * 2000},
    "description: 2000 astral characters": {"description": "\U0001f600" * 2000},
    "completed: true": {"completed": True},
    "completed: false": {"completed": False},
}
NOT_OBJECTS = {
    "array": "[]",
    "array of a name": '["title"]',
    "array of a task": '[{"title": "a"}]',
    "string": '"title"',
    "number": "1",
    "true": "true",
    "null": "null",
    "empty body": "",
    "not JSON": "title",
    "NaN": '{"title": "a", "completed": NaN}',
    "single quotes": "{'title': 'a'}",
    "two values": '{"title": "a"} {}',
    "NUL": '{"title": "a\\u0000"}',
    "half a surrogate pair": '{"title": "\\ud83d"}',
    "raw line end": '{"title": "a\nb"}',
    "nested deeply": '{"title": ' + "[" * 20_000,
}


def as_json(changes: dict[str, Any], **fields: Any) -> str:
    """Return a body as JSON without escapes, as a user of psql would write it."""
    return json.dumps({**fields, **changes}, ensure_ascii=False)


@dataclass(frozen=True)
class Case:
    """A body, and whether it is valid."""

    body: str
    valid: bool


REJECTED = {name: Case(body, valid=False) for name, body in NOT_OBJECTS.items()}
CREATE_CASES = {
    **REJECTED,
    **{name: Case(as_json(changes, title="a"), valid=False) for name, changes in INVALID_CHANGES.items()},
    **{name: Case(as_json(changes, title="a"), valid=True) for name, changes in VALID_CHANGES.items()},
    "no title": Case('{"description": "a"}', valid=False),
    "no field": Case("{}", valid=False),
}
UPDATE_CASES = {
    **REJECTED,
    **{name: Case(as_json(changes), valid=False) for name, changes in INVALID_CHANGES.items()},
    **{name: Case(as_json(changes), valid=True) for name, changes in VALID_CHANGES.items()},
    "no field": Case("{}", valid=True),
    "escapes": Case('{"title": "\\u0041\\ud83d\\ude00"}', valid=True),
}


def psql_accepts(conninfo: str, name: str, **variables: object) -> bool:
    """Run a file of sql/tasks and return whether psql succeeds; it must print either a row or an error."""
    result = run_psql(conninfo, f"sql/tasks/{name}.sql", variables, psql=PSQL)
    assert result.returncode in {0, 3}, result.stderr
    assert ("(1 row)" in result.stdout, "ERROR:" in result.stderr) == (result.returncode == 0, result.returncode == 3)
    return result.returncode == 0


def api_accepts(client: httpx.Client, method: str, path: str, body: str) -> bool:
    """Send a body and return whether the API accepts it; the response must be a success or a 400."""
    response = client.request(
        method, f"/api/tasks{path}", content=body.encode(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code in {200, 201, 400}, response.text
    return response.is_success


@pytest.mark.parametrize("case", CREATE_CASES.values(), ids=CREATE_CASES)
def test_the_api_and_psql_accept_the_same_new_tasks(
    case: Case, client: httpx.Client, db: psycopg.Connection[TupleRow], conninfo: str
) -> None:
    assert api_accepts(client, "POST", "", case.body) is case.valid
    assert psql_accepts(conninfo, "create", task=case.body) is case.valid
    stored = db.execute("SELECT title, description, completed, user_id, version FROM tasks").fetchall()
    assert len(stored) == 2 * case.valid
    assert len(set(stored)) == case.valid


@pytest.mark.parametrize("case", UPDATE_CASES.values(), ids=UPDATE_CASES)
def test_the_api_and_psql_accept_the_same_changes(
    case: Case, client: httpx.Client, create: Create, db: psycopg.Connection[TupleRow], conninfo: str
) -> None:
    psql_id, api_id = (create("before", description="before")["id"] for _ in range(2))
    assert api_accepts(client, "PATCH", f"/{api_id}", case.body) is case.valid
    assert psql_accepts(conninfo, "update", task_id=psql_id, changes=case.body) is case.valid
    stored = db.execute("SELECT title, description, completed, version FROM tasks").fetchall()
    assert stored[0] == stored[1]
    if not case.valid:
        assert stored[0] == ("before", "before", False, 1)


@pytest.mark.parametrize("title", INVALID_TITLES.values(), ids=INVALID_TITLES)
def test_the_table_rejects_an_invalid_title(title: str, db: psycopg.Connection[TupleRow]) -> None:
    assert violates_a_constraint(db, title=title)


@pytest.mark.parametrize("title", VALID_TITLES.values(), ids=VALID_TITLES)
def test_the_table_stores_a_valid_title(title: str, db: psycopg.Connection[TupleRow]) -> None:
    db.execute("INSERT INTO tasks (user_id, title) VALUES ('local', %s)", [title])
    assert db.execute("SELECT title FROM tasks").fetchall() == [(title,)]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("title", None),
        ("description", "a" * 2001),
        ("completed", None),
        ("user_id", None),
        ("user_id", ""),
        ("user_id", "a" * 256),
        ("version", None),
        ("version", 0),
        ("created_at", None),
        ("created_at", "infinity"),
        ("created_at", "-infinity"),
        ("updated_at", None),
        ("updated_at", "infinity"),
        ("updated_at", "2000-01-01"),
    ],
)
def test_the_table_rejects_an_invalid_value(column: str, value: object, db: psycopg.Connection[TupleRow]) -> None:
    assert violates_a_constraint(db, **{column: value})


@pytest.mark.parametrize("task_id", [0, -1])
def test_the_table_rejects_an_id_that_is_not_positive(task_id: int, db: psycopg.Connection[TupleRow]) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        db.execute(
            "INSERT INTO tasks (id, user_id, title) OVERRIDING SYSTEM VALUE VALUES (%s, 'local', 'a')", [task_id]
        )
    with pytest.raises(psycopg.errors.GeneratedAlways):
        db.execute("INSERT INTO tasks (id, user_id, title) VALUES (%s, 'local', 'a')", [task_id])


def violates_a_constraint(db: psycopg.Connection[TupleRow], **columns: object) -> bool:
    """Check that an INSERT and an UPDATE with these columns fail, and return whether the table is unchanged."""
    before = db.execute("INSERT INTO tasks (user_id, title) VALUES ('local', 'a') RETURNING *").fetchall()
    row = {"user_id": "local", "title": "a", **columns}
    column_names = sql.SQL(", ").join(map(sql.Identifier, row))
    placeholders = sql.SQL(", ").join(sql.Placeholder() * len(row))
    for statement in (
        sql.SQL("INSERT INTO tasks ({}) VALUES ({})").format(column_names, placeholders),
        sql.SQL("UPDATE tasks SET ({}) = ROW ({})").format(column_names, placeholders),
    ):
        with pytest.raises(psycopg.errors.IntegrityError):
            db.execute(statement, list(row.values()))
    return db.execute("SELECT * FROM tasks").fetchall() == before


@pytest.mark.parametrize(
    ("name", "body", "constraint"),
    [
        ("create", "{}", "title_is_required"),
        ("create", "[]", "body_is_an_object"),
        ("create", '{"title": 1}', "title_is_a_string"),
        ("create", '{"title": " "}', "title_is_not_only_white_space"),
        ("update", '{"description": 1}', "description_is_a_string_or_null"),
        ("update", '{"completed": "yes"}', "completed_is_true_or_false"),
        ("update", '{"version": 2}', "body_has_only_known_members"),
    ],
)
def test_psql_names_the_constraint_that_a_body_violates(
    name: str, body: str, constraint: str, create: Create, conninfo: str
) -> None:
    variables = {"task": body} if name == "create" else {"task_id": create()["id"], "changes": body}
    assert f'"{constraint}"' in run_psql(conninfo, f"sql/tasks/{name}.sql", variables, psql=PSQL).stderr
