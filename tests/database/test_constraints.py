"""What the API refuses, psql refuses too, and what the API takes, psql takes: one list of cases for both."""

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
from todo_api.embedded import cluster

PSQL = str(cluster.bin_folder() / "psql")  # one is enough: the rules are the server's
WHITE_SPACE = [character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()]
LAST = chr(sys.maxunicode)

GOOD_TITLES = {
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
    "noncharacters": "\uffff" + LAST,
    "no text direction": "\u202e",
}
BAD_TITLES = {
    "empty": "",
    "201 characters": "a" * 201,
    "201 astral characters": "\U0001f600" * 201,
    "201 white space characters": " " * 201,
    "all white space": "".join(WHITE_SPACE),
    **{f"only U+{ord(character):04X}": character for character in WHITE_SPACE},
}
BAD_CHANGES: dict[str, dict[str, Any]] = {
    **{f"title: {name}": {"title": title} for name, title in BAD_TITLES.items()},
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
        f"member: {name}": {name: value}
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
GOOD_CHANGES: dict[str, dict[str, Any]] = {
    **{f"title: {name}": {"title": title} for name, title in GOOD_TITLES.items()},
    "description: null": {"description": None},
    "description: empty": {"description": ""},
    "description: white space": {"description": "".join(WHITE_SPACE)},
    "description: 2000 characters": {"description": "a" * 2000},
    "description: 2000 astral characters": {"description": "\U0001f600" * 2000},
    "completed: true": {"completed": True},
    "completed: false": {"completed": False},
}
NO_OBJECTS = {
    "array": "[]",
    "array of names": '["title"]',
    "array of a task": '[{"title": "a"}]',
    "string": '"title"',
    "number": "1",
    "true": "true",
    "null": "null",
    "nothing": "",
    "no JSON": "title",
    "NaN": '{"title": "a", "completed": NaN}',
    "single quotes": "{'title': 'a'}",
    "two values": '{"title": "a"} {}',
    "NUL": '{"title": "a\\u0000"}',
    "half a surrogate pair": '{"title": "\\ud83d"}',
    "raw line end": '{"title": "a\nb"}',
    "nested deeply": '{"title": ' + "[" * 20_000,
}


def as_json(changes: dict[str, Any], **members: Any) -> str:
    """Write a body as the file's user would: with its characters, not with escapes."""
    return json.dumps({**members, **changes}, ensure_ascii=False)


@dataclass(frozen=True)
class Case:
    """A body, and whether it is taken."""

    body: str
    taken: bool


REFUSED = {name: Case(body, taken=False) for name, body in NO_OBJECTS.items()}
CREATED = {
    **REFUSED,
    **{name: Case(as_json(changes, title="a"), taken=False) for name, changes in BAD_CHANGES.items()},
    **{name: Case(as_json(changes, title="a"), taken=True) for name, changes in GOOD_CHANGES.items()},
    "no title": Case('{"description": "a"}', taken=False),
    "no member": Case("{}", taken=False),
}
CHANGED = {
    **REFUSED,
    **{name: Case(as_json(changes), taken=False) for name, changes in BAD_CHANGES.items()},
    **{name: Case(as_json(changes), taken=True) for name, changes in GOOD_CHANGES.items()},
    "no member": Case("{}", taken=True),
    "escapes": Case('{"title": "\\u0041\\ud83d\\ude00"}', taken=True),
}


def psql_takes(conninfo: str, name: str, **variables: object) -> bool:
    """Run a file of sql/tasks and say whether psql's exit status is 0 and a row came."""
    done = run_psql(conninfo, f"sql/tasks/{name}.sql", variables, psql=PSQL)
    assert done.returncode in {0, 3}, done.stderr
    assert ("(1 row)" in done.stdout, "ERROR:" in done.stderr) == (done.returncode == 0, done.returncode == 3)
    return done.returncode == 0


def rest_takes(client: httpx.Client, method: str, path: str, body: str) -> bool:
    """Send a body and say whether the answer is a success; a refusal must be a 400."""
    response = client.request(
        method, f"/api/tasks{path}", content=body.encode(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code in {200, 201, 400}, response.text
    return response.is_success


@pytest.mark.parametrize("case", CREATED.values(), ids=CREATED)
def test_rest_and_psql_agree_on_what_is_created(
    case: Case, client: httpx.Client, db: psycopg.Connection[TupleRow], conninfo: str
) -> None:
    assert rest_takes(client, "POST", "", case.body) is case.taken
    assert psql_takes(conninfo, "create", task=case.body) is case.taken
    stored = db.execute("SELECT title, description, completed, user_id, version FROM tasks").fetchall()
    assert len(stored) == 2 * case.taken
    assert len(set(stored)) == case.taken


@pytest.mark.parametrize("case", CHANGED.values(), ids=CHANGED)
def test_rest_and_psql_agree_on_what_is_changed(
    case: Case, client: httpx.Client, create: Create, db: psycopg.Connection[TupleRow], conninfo: str
) -> None:
    ours, theirs = (create("before", description="before")["id"] for _ in range(2))
    assert rest_takes(client, "PATCH", f"/{theirs}", case.body) is case.taken
    assert psql_takes(conninfo, "update", task_id=ours, changes=case.body) is case.taken
    stored = db.execute("SELECT title, description, completed, version FROM tasks").fetchall()
    assert stored[0] == stored[1]
    if not case.taken:
        assert stored[0] == ("before", "before", False, 1)


@pytest.mark.parametrize("title", BAD_TITLES.values(), ids=BAD_TITLES)
def test_the_table_refuses_a_bad_title(title: str, db: psycopg.Connection[TupleRow]) -> None:
    assert breaks_a_rule(db, title=title)


@pytest.mark.parametrize("title", GOOD_TITLES.values(), ids=GOOD_TITLES)
def test_the_table_keeps_a_good_title(title: str, db: psycopg.Connection[TupleRow]) -> None:
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
def test_the_table_refuses_a_bad_value(column: str, value: object, db: psycopg.Connection[TupleRow]) -> None:
    assert breaks_a_rule(db, **{column: value})


@pytest.mark.parametrize("task_id", [0, -1])
def test_the_table_refuses_an_id_that_no_path_can_name(task_id: int, db: psycopg.Connection[TupleRow]) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        db.execute(
            "INSERT INTO tasks (id, user_id, title) OVERRIDING SYSTEM VALUE VALUES (%s, 'local', 'a')", [task_id]
        )
    with pytest.raises(psycopg.errors.GeneratedAlways):
        db.execute("INSERT INTO tasks (id, user_id, title) VALUES (%s, 'local', 'a')", [task_id])


def breaks_a_rule(db: psycopg.Connection[TupleRow], **columns: object) -> bool:
    """Say whether a direct INSERT and a direct UPDATE with these columns both break a constraint."""
    before = db.execute("INSERT INTO tasks (user_id, title) VALUES ('local', 'a') RETURNING *").fetchall()
    row = {"user_id": "local", "title": "a", **columns}
    names = sql.SQL(", ").join(map(sql.Identifier, row))
    values = sql.SQL(", ").join(sql.Placeholder() * len(row))
    for statement in (
        sql.SQL("INSERT INTO tasks ({}) VALUES ({})").format(names, values),
        sql.SQL("UPDATE tasks SET ({}) = ROW ({})").format(names, values),
    ):
        with pytest.raises(psycopg.errors.IntegrityError):
            db.execute(statement, list(row.values()))
    return db.execute("SELECT * FROM tasks").fetchall() == before


@pytest.mark.parametrize(
    ("name", "body", "rule"),
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
def test_psql_names_the_rule_that_a_body_breaks(name: str, body: str, rule: str, create: Create, conninfo: str) -> None:
    variables = {"task": body} if name == "create" else {"task_id": create()["id"], "changes": body}
    assert f'"{rule}"' in run_psql(conninfo, f"sql/tasks/{name}.sql", variables, psql=PSQL).stderr
