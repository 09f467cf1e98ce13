"""Invalid input is rejected: the problem lists every error, and nothing is stored."""

import json
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.fixtures import Create
from tests.support.problems import assert_problem

JSON = {"Content-Type": "application/json"}
UNKNOWN_FIELD = "Unknown field (the fields are title, description and completed)"
WHITE_SPACE = [chr(code) for code in range(0x110000) if chr(code).isspace()]

NOT_STRINGS: list[Any] = [1, 1.5, True, False, [], {}, ["x"]]
NOT_BOOLEANS: list[Any] = ["yes", "true", "on", 1, 0, 1.0, None, [], ""]
NOT_OBJECTS: list[Any] = [[], [{"title": "x"}], "x", 1, True, None]
INVALID_BODIES: list[tuple[Any, dict[str, str]]] = [
    ({"title": "x" * 201}, {"#/title": "Title exceeds maximum length of 200 characters"}),
    ({"title": "\U0001f95b" * 201}, {"#/title": "Title exceeds maximum length of 200 characters"}),
    ({"title": ""}, {"#/title": "Title must not be blank"}),
    ({"title": None}, {"#/title": "Title must not be null"}),
    *(({"title": value}, {"#/title": "Title must be a string"}) for value in NOT_STRINGS),
    *(
        ({"title": "x", "description": value}, {"#/description": "Description must be a string or null"})
        for value in NOT_STRINGS
    ),
    (
        {"title": "x", "description": "x" * 2001},
        {"#/description": "Description exceeds maximum length of 2000 characters"},
    ),
    *(
        ({"title": "x", "completed": value}, {"#/completed": "Completed must be true or false"})
        for value in NOT_BOOLEANS
    ),
    *(
        ({"title": "x", name: value}, {f"#/{name}": UNKNOWN_FIELD})
        for name, value in {
            "id": 1,
            "user_id": "local",
            "version": 1,
            "created_at": "2026-01-01T00:00:00Z",
            "updated_at": "2026-01-01T00:00:00Z",
            "priority": "high",
            "Title": "x",
            "": "x",
        }.items()
    ),
    ({"title": "x", "_schema": {}}, {"#/_schema": UNKNOWN_FIELD}),
    ({"title": "x", "a/b~c d%": 1}, {"#/a~1b~0c%20d%25": UNKNOWN_FIELD}),
    (
        {"title": 1, "description": 2, "completed": 3, "x": 4},
        {
            "#/completed": "Completed must be true or false",
            "#/description": "Description must be a string or null",
            "#/title": "Title must be a string",
            "#/x": UNKNOWN_FIELD,
        },
    ),
    *((value, {"#": "The body must be a JSON object"}) for value in NOT_OBJECTS),
]


def errors_by_pointer(problem: dict[str, Any]) -> dict[str, str]:
    """Return the details of a problem's errors by their pointers."""
    return {error["pointer"]: error["detail"] for error in problem["errors"]}


@pytest.mark.parametrize(("body", "errors"), [*INVALID_BODIES, ({}, {"#/title": "Title is required"})])
def test_create_lists_every_error_and_stores_nothing(
    client: httpx.Client, db: psycopg.Connection[TupleRow], body: object, errors: dict[str, str]
) -> None:
    problem = assert_problem(client.post("/api/tasks", content=json.dumps(body), headers=JSON), 400, "validation_error")
    assert errors_by_pointer(problem) == errors
    assert problem["title"] == "Validation Error"
    assert problem["instance"] == "/api/tasks"
    assert all(detail in problem["detail"] for detail in errors.values())
    assert db.execute("SELECT 1 FROM tasks").fetchall() == []


@pytest.mark.parametrize(("body", "errors"), INVALID_BODIES)
def test_patch_lists_every_error_and_changes_nothing(
    client: httpx.Client, create: Create, body: object, errors: dict[str, str]
) -> None:
    task = create()
    path = f"/api/tasks/{task['id']}"
    assert (
        errors_by_pointer(
            assert_problem(client.patch(path, content=json.dumps(body), headers=JSON), 400, "validation_error")
        )
        == errors
    )
    assert client.get(path).json() == task


def test_a_title_of_only_white_space_of_any_kind_is_rejected(client: httpx.Client) -> None:
    assert len(WHITE_SPACE) > 20
    for space in WHITE_SPACE:
        for title in (space, space * 3):
            problem = assert_problem(client.post("/api/tasks", json={"title": title}), 400, "validation_error")
            assert errors_by_pointer(problem) == {"#/title": "Title must not be blank"}


MALFORMED = [
    b"",
    b"{",
    b"title=Buy milk",
    b"{'title': 'x'}",
    b'{"title": "x",}',
    b'{"title": "x"} {}',
    b'{"title": "tab\there"}',
    b'{"title": "nul\x00here"}',
    b'{"title": NaN}',
    b'{"title": "x", "completed": Infinity}',
    b'{"title": -Infinity}',
    rb'{"title": "nul \u0000"}',
    rb'{"title": "half a pair \ud83d"}',
    rb'{"title": "the other half \udc00"}',
    rb'{"title": "x", "description": "\ud83d\ud83d"}',
    rb'{"title": "x", "\u0000": 1}',
    rb'{"title": "x", "\udfff": 1}',
    rb'{"title": ["\u0000"]}',
    rb'{"title": "x", "description": {"a": [[1, "\udc00"]]}}',
    b'{"title": "x", "title": "y"}',
    b'{"title": "\xff\xfe"}',
    b'{"title": "\xed\xa0\x80"}',
    '{"title": "x"}'.encode("utf-16"),
    b"\xef\xbb\xbf" + b'{"title": "x"}',
    b"[" * 60_000,
    b'{"title":' * 6_000,
    b'{"title": "x", "description": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:24]))
def test_a_body_that_is_not_strict_json_is_rejected_and_stores_nothing(
    client: httpx.Client, db: psycopg.Connection[TupleRow], create: Create, body: bytes
) -> None:
    assert "errors" not in assert_problem(
        client.post("/api/tasks", content=body, headers=JSON), 400, "malformed_request"
    )
    assert db.execute("SELECT 1 FROM tasks").fetchall() == []
    task = create()
    path = f"/api/tasks/{task['id']}"
    assert_problem(client.patch(path, content=body, headers=JSON), 400, "malformed_request")
    assert client.get(path).json() == task


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "9" * 60_000, "1e400", "1" * 400 + ".5"])
def test_a_number_of_any_length_is_rejected_as_a_title(client: httpx.Client, number: str) -> None:
    body = f'{{"title": {number}}}'
    response = client.post("/api/tasks", content=body, headers=JSON)
    assert errors_by_pointer(assert_problem(response, 400, "validation_error")) == {"#/title": "Title must be a string"}


def test_escape_sequences_of_json_are_decoded(client: httpx.Client) -> None:
    body = rb'{"title": "\ud83e\udd5b \\u0000 \\ud800 \u0041"}'
    response = client.post("/api/tasks", content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert response.json()["title"] == "\U0001f95b \\u0000 \\ud800 A"


@pytest.mark.parametrize(
    "media_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/jsonx",
        "application/merge-patch+json",
        "application/vnd.api+json",
        "json",
        "",
    ],
)
def test_a_body_with_another_media_type_returns_415(client: httpx.Client, media_type: str | None) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    response = client.post("/api/tasks", content=b'{"title": "x"}', headers=headers)
    problem = assert_problem(response, 415, "unsupported_media_type")
    assert "application/json" in problem["detail"]


def test_a_compressed_body_returns_415(client: httpx.Client) -> None:
    headers = JSON | {"Content-Encoding": "gzip"}
    assert_problem(client.post("/api/tasks", content=b"\x1f\x8b", headers=headers), 415, "unsupported_media_type")


def test_the_415_of_patch_names_json_merge_patch(client: httpx.Client, create: Create) -> None:
    response = client.patch(
        f"/api/tasks/{create()['id']}", content=b"{}", headers={"Content-Type": "application/json-patch+json"}
    )
    assert "application/merge-patch+json" in assert_problem(response, 415, "unsupported_media_type")["detail"]


def test_every_unknown_query_parameter_is_named(client: httpx.Client) -> None:
    response = client.get("/api/tasks?page=2&colour=red")
    problem = assert_problem(response, 400, "validation_error")
    assert problem["errors"] == [
        {"parameter": "colour", "detail": "Unknown parameter"},
        {"parameter": "page", "detail": "Unknown parameter"},
    ]


def test_a_body_at_the_limit_is_accepted_and_a_larger_one_returns_413(client: httpx.Client) -> None:
    body = json.dumps({"title": "x"}).encode()
    accepted = client.post("/api/tasks", content=body.ljust(65_536), headers=JSON)
    assert accepted.status_code == 201
    assert_problem(client.post("/api/tasks", content=body.ljust(65_537), headers=JSON), 413, "content_too_large")


def test_a_chunked_body_at_the_limit_is_accepted_and_a_larger_one_returns_413(client: httpx.Client) -> None:
    def chunks(length: int) -> Any:
        body = json.dumps({"title": "x"}).encode().ljust(length)
        return (body[start : start + 1000] for start in range(0, length, 1000))

    assert client.post("/api/tasks", content=chunks(65_536), headers=JSON).status_code == 201
    too_large = client.post("/api/tasks", content=chunks(65_537), headers=JSON)
    assert_problem(too_large, 413, "content_too_large")
