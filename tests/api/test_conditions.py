"""Conditional requests: what a client knows is not sent again, and what it has not seen is not overwritten."""

import json
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.fixtures import Create
from tests.support.load import at_once
from tests.support.problems import assert_problem
from tests.support.psql import PSQLS, comparable, rows_of
from tests.support.service import Service

Write = Callable[[httpx.Client, int, str], httpx.Response]
WRITES: dict[str, Write] = {
    "update": lambda client, task_id, tags: client.patch(
        f"/api/tasks/{task_id}", headers=if_match(tags), json={"title": f"{uuid.uuid4()}"}
    ),
    "toggle": lambda client, task_id, tags: client.post(f"/api/tasks/{task_id}/toggle", headers=if_match(tags)),
    "delete": lambda client, task_id, tags: client.delete(f"/api/tasks/{task_id}", headers=if_match(tags)),
}
MATCHING = ['"1"', '"7","1"', '"7" , "1"', 'W/"1", "1"', '"a,b", "1"', '"x"' + ', "5"' * 500 + ', "1"', "*"]
NOT_MATCHING = [
    *(
        '"2"',
        '"9" "1"',
        '"9""1"',
        'W/"9""1"',
        'garbage "1"',
        '*, "1"',
        '* "1"',
        'W/ "1"',
        '"7","8"',
        'W/"1"',
        'W/"1", "2"',
        '"1',
        '1"',
        "1",
        '"1"x',
        'x"1"',
        '"x,"1",y"',
        '"0"',
        '"01"',
        '"+1"',
        '"1.0"',
        '" 1"',
        '""',
        "",
    ),
    *(",", "garbage", '"1\\"', '"-1"', f'"{2**63}"', f'"{"9" * 4000}"', '"{}"', '"1}"', '"null"', '"\u0661"', '"x", *'),
]


def if_match(tags: str) -> dict[bytes, bytes]:
    """Give the header; httpx encodes no text that is not ASCII."""
    return {b"If-Match": tags.encode()}


def get(client: httpx.Client, task_id: int) -> httpx.Response:
    """Get a task."""
    return client.get(f"/api/tasks/{task_id}")


def test_every_answer_with_a_task_has_its_version_as_a_strong_tag(client: httpx.Client) -> None:
    created = client.post("/api/tasks", json={"title": "Buy milk"})
    path = f"/api/tasks/{created.json()['id']}"
    answers = [
        created,
        client.get(path),
        client.head(path),
        client.patch(path, json={}),
        client.patch(path, json={"completed": True}),
        client.post(f"{path}/toggle"),
        client.get(path),
        client.delete(path),
    ]
    assert [answer.headers["ETag"] for answer in answers] == [f'"{n}"' for n in (1, 1, 1, 1, 2, 3, 3, 3)]
    assert {answer.headers["Cache-Control"] for answer in answers} == {"private, no-cache"}
    assert "ETag" not in client.get(path).headers


@pytest.mark.parametrize("known", ['"1"', 'W/"1"', '"7", "1"', '"7", W/"1"', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_task_that_the_client_has_is_a_304(client: httpx.Client, create: Create, method: str, known: str) -> None:
    path = f"/api/tasks/{create()['id']}"
    answer = client.request(method, path, headers={"If-None-Match": known})
    assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", '"1"')
    assert {"Content-Type", "Content-Length"}.isdisjoint(answer.headers)
    client.post(f"{path}/toggle")
    if known != "*":
        assert client.request(method, path, headers={"If-None-Match": known}).status_code == 200


@pytest.mark.parametrize("unknown", ['"2"', "garbage", "", ",", '"1', "\xe9", '""', '"11"', '"\\"'])
def test_a_task_that_the_client_does_not_have_is_sent(client: httpx.Client, create: Create, unknown: str) -> None:
    task = create()
    answer = client.get(f"/api/tasks/{task['id']}", headers={b"If-None-Match": unknown.encode()})
    assert (answer.status_code, answer.json()) == (200, task)


def test_a_task_that_is_not_there_stays_404(client: httpx.Client, create: Create) -> None:
    task_id = create()["id"]
    client.delete(f"/api/tasks/{task_id}")
    for known in ("*", '"1"'):
        answer = client.get(f"/api/tasks/{task_id}", headers={"If-None-Match": known})
        assert_problem(answer, 404, "not_found")
        for write in WRITES.values():
            assert_problem(write(client, task_id, known), 404, "not_found")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("query", ["", "?limit=1", "?completed=false&q=milk"])
def test_a_list_that_the_client_has_is_a_304(
    client: httpx.Client, create: Create, db: psycopg.Connection[TupleRow], query: str, method: str
) -> None:
    create()
    create()
    assert db
    first = client.request(method, f"/api/tasks{query}")
    tag = first.headers["ETag"]
    assert tag.startswith('W/"')
    for known in (tag, tag.removeprefix("W/"), f'"x", {tag}', "*"):
        answer = client.request(method, f"/api/tasks{query}", headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", tag)
        assert answer.headers.get("Link") == first.headers.get("Link")
    assert client.request(method, f"/api/tasks{query}", headers={"If-None-Match": '"x"'}).status_code == 200


def test_the_tag_of_a_list_changes_with_each_change(
    client: httpx.Client, create: Create, db: psycopg.Connection[TupleRow]
) -> None:
    def tag() -> str:
        etag: str = client.get("/api/tasks").headers["ETag"]
        return etag

    assert db
    tags = [tag()]
    path = f"/api/tasks/{create()['id']}"
    tags.append(tag())
    client.patch(path, json={"description": ""})
    tags.append(tag())
    for _ in range(2):
        client.post(f"{path}/toggle")
        tags.append(tag())
    client.patch(path, json={})
    assert tag() == tags[-1]
    client.delete(path)
    assert tag() == tags[0]
    assert len(set(tags)) == len(tags)


def test_a_page_that_becomes_the_last_one_has_another_tag(
    client: httpx.Client, db: psycopg.Connection[TupleRow]
) -> None:
    db.execute("INSERT INTO tasks (user_id, title) VALUES ('local', 'a'), ('local', 'b')")
    first = client.get("/api/tasks?limit=1")
    db.execute("DELETE FROM tasks WHERE title = 'a'")
    last = client.get("/api/tasks?limit=1", headers={"If-None-Match": first.headers["ETag"]})
    assert (last.status_code, last.content, "Link" in last.headers) == (200, first.content, False)


@pytest.mark.parametrize("tags", MATCHING, ids=lambda tags: tags[:20])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_with_the_tag_of_the_task_is_done(client: httpx.Client, create: Create, write: str, tags: str) -> None:
    task = create()
    answer = WRITES[write](client, task["id"], tags)
    assert answer.status_code == 200
    assert answer.json()["version"] == (1 if write == "delete" else 2)


@pytest.mark.parametrize("tags", NOT_MATCHING, ids=lambda tags: repr(tags[:20]))
@pytest.mark.parametrize("write", WRITES)
def test_a_write_without_the_tag_of_the_task_is_412_and_changes_nothing(
    client: httpx.Client, create: Create, write: str, tags: str
) -> None:
    task = create()
    answer = WRITES[write](client, task["id"], tags)
    problem = assert_problem(answer, 412, "precondition_failed")
    assert answer.headers["ETag"] == '"1"'
    assert '"1"' in problem["detail"]
    assert get(client, task["id"]).json() == task


def test_the_tag_of_a_412_is_good_for_the_next_try(client: httpx.Client, create: Create) -> None:
    task_id = create()["id"]
    for write in WRITES.values():
        refused = write(client, task_id, '"99"')
        assert refused.status_code == 412
        assert write(client, task_id, refused.headers["ETag"]).status_code == 200


def test_a_patch_that_changes_nothing_still_needs_the_tag(client: httpx.Client, create: Create) -> None:
    path = f"/api/tasks/{create()['id']}"
    assert client.patch(path, json={}, headers={"If-Match": '"2"'}).status_code == 412
    assert client.patch(path, json={}, headers={"If-Match": '"1"'}).headers["ETag"] == '"1"'


def test_an_invalid_body_is_400_whatever_the_tag(client: httpx.Client, create: Create) -> None:
    path = f"/api/tasks/{create()['id']}"
    assert_problem(client.patch(path, json={"title": 1}, headers={"If-Match": '"2"'}), 400, "validation_error")


@pytest.mark.parametrize("write", WRITES)
def test_of_50_racing_writers_with_one_tag_one_wins(
    service: Service, client: httpx.Client, create: Create, write: str
) -> None:
    task_id = create()["id"]
    answers = at_once(service, 50, lambda racer, _: WRITES[write](racer, task_id, '"1"'))
    statuses = Counter(answer.status_code for answer in answers)
    [won] = [answer for answer in answers if answer.status_code == 200]
    if write == "delete":
        assert statuses == {200: 1, 404: 49}
        assert get(client, task_id).status_code == 404
    else:
        assert statuses == {200: 1, 412: 49}
        assert {answer.headers["ETag"] for answer in answers} == {'"2"'}
        assert get(client, task_id).json() == won.json()


@pytest.mark.parametrize("psql", PSQLS)
def test_psql_compares_versions_too(psql: str, client: httpx.Client, create: Create, conninfo: str) -> None:
    task = create()
    writes: list[tuple[str, dict[str, Any]]] = [
        ("update", {"changes": json.dumps({"title": "Buy bread"})}),
        ("toggle", {}),
        ("delete", {}),
    ]
    for version, (name, given) in enumerate(writes, 1):
        before = comparable(get(client, task["id"]).json())
        for if_match in (f"{{{version + 1}}}", "{0}", f"{{{version + 1},{2**63 - 1}}}"):
            assert rows_of(conninfo, name, psql, task_id=task["id"], if_match=if_match, **given) == []
        assert comparable(get(client, task["id"]).json()) == before
        [row] = rows_of(conninfo, name, psql, task_id=task["id"], if_match=f"{{9,{version}}}", **given)
        assert row["version"] == min(version + 1, 3)
    assert get(client, task["id"]).status_code == 404
