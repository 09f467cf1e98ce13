"""Conditional requests: If-None-Match avoids sending a task again, and If-Match avoids lost updates."""

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

# Sends a write with a client, the id of a task and the value of If-Match.
Write = Callable[[httpx.Client, int, str], httpx.Response]
WRITES: dict[str, Write] = {
    "update": lambda client, task_id, etags: client.patch(
        f"/api/tasks/{task_id}", headers=if_match_header(etags), json={"title": f"{uuid.uuid4()}"}
    ),
    "toggle": lambda client, task_id, etags: client.post(
        f"/api/tasks/{task_id}/toggle", headers=if_match_header(etags)
    ),
    "delete": lambda client, task_id, etags: client.delete(f"/api/tasks/{task_id}", headers=if_match_header(etags)),
}
# Values of If-Match for a task at version 1.
MATCHING = [
    '"1"',
    '"1-gzip"',
    '"1--gzip"',
    '"1;gzip"',
    '"1-br"',
    '"9-gzip", "1-gzip"',
    '"7","1"',
    '"7" , "1"',
    'W/"1", "1"',
    '"a,b", "1"',
    '"x"' + ', "5"' * 500 + ', "1"',
    "*",
]
NOT_MATCHING = [
    *(
        '"2"',
        '"9" "1"',
        '"9""1"',
        '"1-"',
        '"1-x"',
        '"1gzip"',
        '"1-gzip-gzip"',
        '"9-gzip"',
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


def if_match_header(etags: str) -> dict[bytes, bytes]:
    """Return an If-Match header. It is bytes, because httpx accepts only ASCII in a ``str``."""
    return {b"If-Match": etags.encode()}


def get_task(client: httpx.Client, task_id: int) -> httpx.Response:
    """Get a task and return the response."""
    return client.get(f"/api/tasks/{task_id}")


def test_every_response_with_a_task_has_its_version_as_a_strong_etag(client: httpx.Client) -> None:
    created = client.post("/api/tasks", json={"title": "Buy milk"})
    path = f"/api/tasks/{created.json()['id']}"
    responses = [
        created,
        client.get(path),
        client.head(path),
        client.patch(path, json={}),
        client.patch(path, json={"completed": True}),
        client.post(f"{path}/toggle"),
        client.get(path),
        client.delete(path),
    ]
    assert [response.headers["ETag"] for response in responses] == [f'"{n}"' for n in (1, 1, 1, 1, 2, 3, 3, 3)]
    assert {response.headers["Cache-Control"] for response in responses} == {"private, no-cache"}
    assert "ETag" not in client.get(path).headers


@pytest.mark.parametrize(
    "if_none_match", ['"1"', '"1-gzip"', 'W/"1-gzip"', '"1--gzip"', '"1;gzip"', 'W/"1"', '"7", "1"', '"7", W/"1"', "*"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_get_returns_304_if_the_etag_matches(
    client: httpx.Client, create: Create, method: str, if_none_match: str
) -> None:
    path = f"/api/tasks/{create()['id']}"
    response = client.request(method, path, headers={"If-None-Match": if_none_match})
    assert (response.status_code, response.content, response.headers["ETag"]) == (304, b"", '"1"')
    assert {"Content-Type", "Content-Length"}.isdisjoint(response.headers)
    client.post(f"{path}/toggle")
    if if_none_match != "*":
        assert client.request(method, path, headers={"If-None-Match": if_none_match}).status_code == 200


@pytest.mark.parametrize("if_none_match", ['"2"', "garbage", "", ",", '"1', "\xe9", '""', '"11"', '"\\"'])
def test_get_returns_the_task_if_no_etag_matches(client: httpx.Client, create: Create, if_none_match: str) -> None:
    task = create()
    response = client.get(f"/api/tasks/{task['id']}", headers={b"If-None-Match": if_none_match.encode()})
    assert (response.status_code, response.json()) == (200, task)


def test_a_conditional_request_for_a_missing_task_returns_404(client: httpx.Client, create: Create) -> None:
    task_id = create()["id"]
    client.delete(f"/api/tasks/{task_id}")
    for if_none_match in ("*", '"1"'):
        response = client.get(f"/api/tasks/{task_id}", headers={"If-None-Match": if_none_match})
        assert_problem(response, 404, "not_found")
        for write in WRITES.values():
            assert_problem(write(client, task_id, if_none_match), 404, "not_found")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("query", ["", "?limit=1", "?completed=false&q=milk"])
def test_list_returns_304_if_the_etag_matches(
    client: httpx.Client, create: Create, db: psycopg.Connection[TupleRow], query: str, method: str
) -> None:
    create()
    create()
    assert db
    first = client.request(method, f"/api/tasks{query}")
    etag = first.headers["ETag"]
    assert etag.startswith('W/"')
    for if_none_match in (etag, etag.removeprefix("W/"), f'"x", {etag}', "*"):
        response = client.request(method, f"/api/tasks{query}", headers={"If-None-Match": if_none_match})
        assert (response.status_code, response.content, response.headers["ETag"]) == (304, b"", etag)
        assert response.headers.get("Link") == first.headers.get("Link")
    assert client.request(method, f"/api/tasks{query}", headers={"If-None-Match": '"x"'}).status_code == 200


def test_the_etag_of_a_list_changes_with_every_change(
    client: httpx.Client, create: Create, db: psycopg.Connection[TupleRow]
) -> None:
    def list_etag() -> str:
        etag: str = client.get("/api/tasks").headers["ETag"]
        return etag

    assert db
    etags = [list_etag()]
    path = f"/api/tasks/{create()['id']}"
    etags.append(list_etag())
    client.patch(path, json={"description": ""})
    etags.append(list_etag())
    for _ in range(2):
        client.post(f"{path}/toggle")
        etags.append(list_etag())
    client.patch(path, json={})
    assert list_etag() == etags[-1]
    client.delete(path)
    assert list_etag() == etags[0]
    assert len(set(etags)) == len(etags)


def test_a_page_that_becomes_the_last_one_gets_a_new_etag(
    client: httpx.Client, db: psycopg.Connection[TupleRow]
) -> None:
    db.execute("INSERT INTO tasks (user_id, title) VALUES ('local', 'a'), ('local', 'b')")
    first = client.get("/api/tasks?limit=1")
    db.execute("DELETE FROM tasks WHERE title = 'a'")
    last = client.get("/api/tasks?limit=1", headers={"If-None-Match": first.headers["ETag"]})
    assert (last.status_code, last.content, "Link" in last.headers) == (200, first.content, False)


@pytest.mark.parametrize("etags", MATCHING, ids=lambda etags: etags[:20])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_with_a_matching_if_match_succeeds(
    client: httpx.Client, create: Create, write: str, etags: str
) -> None:
    task = create()
    response = WRITES[write](client, task["id"], etags)
    assert response.status_code == 200
    assert response.json()["version"] == (1 if write == "delete" else 2)


@pytest.mark.parametrize("etags", NOT_MATCHING, ids=lambda etags: repr(etags[:20]))
@pytest.mark.parametrize("write", WRITES)
def test_a_write_with_a_failing_if_match_returns_412_and_changes_nothing(
    client: httpx.Client, create: Create, write: str, etags: str
) -> None:
    task = create()
    response = WRITES[write](client, task["id"], etags)
    problem = assert_problem(response, 412, "precondition_failed")
    assert response.headers["ETag"] == '"1"'
    assert '"1"' in problem["detail"]
    assert get_task(client, task["id"]).json() == task


def test_a_retry_with_the_etag_of_a_412_succeeds(client: httpx.Client, create: Create) -> None:
    task_id = create()["id"]
    for write in WRITES.values():
        rejected = write(client, task_id, '"99"')
        assert rejected.status_code == 412
        assert write(client, task_id, rejected.headers["ETag"]).status_code == 200


def test_a_patch_that_changes_nothing_still_checks_if_match(client: httpx.Client, create: Create) -> None:
    path = f"/api/tasks/{create()['id']}"
    assert client.patch(path, json={}, headers={"If-Match": '"2"'}).status_code == 412
    assert client.patch(path, json={}, headers={"If-Match": '"1"'}).headers["ETag"] == '"1"'


def test_an_invalid_body_returns_400_even_with_a_failing_if_match(client: httpx.Client, create: Create) -> None:
    path = f"/api/tasks/{create()['id']}"
    assert_problem(client.patch(path, json={"title": 1}, headers={"If-Match": '"2"'}), 400, "validation_error")


@pytest.mark.parametrize("write", WRITES)
def test_only_one_of_many_concurrent_writes_with_the_same_if_match_succeeds(
    service: Service, client: httpx.Client, create: Create, write: str
) -> None:
    task_id = create()["id"]
    responses = at_once(service, 50, lambda own_client, _: WRITES[write](own_client, task_id, '"1"'))
    statuses = Counter(response.status_code for response in responses)
    [winner] = [response for response in responses if response.status_code == 200]
    if write == "delete":
        assert statuses == {200: 1, 404: 49}
        assert get_task(client, task_id).status_code == 404
    else:
        assert statuses == {200: 1, 412: 49}
        assert {response.headers["ETag"] for response in responses} == {'"2"'}
        assert get_task(client, task_id).json() == winner.json()


@pytest.mark.parametrize("psql", PSQLS)
def test_psql_checks_versions_too(psql: str, client: httpx.Client, create: Create, conninfo: str) -> None:
    task = create()
    writes: list[tuple[str, dict[str, Any]]] = [
        ("update", {"changes": json.dumps({"title": "Buy bread"})}),
        ("toggle", {}),
        ("delete", {}),
    ]
    for version, (name, parameters) in enumerate(writes, 1):
        before = comparable(get_task(client, task["id"]).json())
        for if_match in (f"{{{version + 1}}}", "{0}", f"{{{version + 1},{2**63 - 1}}}"):
            assert rows_of(conninfo, name, psql, task_id=task["id"], if_match=if_match, **parameters) == []
        assert comparable(get_task(client, task["id"]).json()) == before
        [row] = rows_of(conninfo, name, psql, task_id=task["id"], if_match=f"{{9,{version}}}", **parameters)
        assert row["version"] == min(version + 1, 3)
    assert get_task(client, task["id"]).status_code == 404
