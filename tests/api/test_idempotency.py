"""Idempotency-Key: the retry of a create returns the first response and creates nothing."""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.load import at_once
from tests.support.problems import assert_problem
from tests.support.psql import PSQLS, comparable, rows_of, run_psql
from tests.support.service import Service

TASK: dict[str, Any] = {"title": "Buy milk", "description": "2 litres", "completed": True}
JSON = {"Content-Type": "application/json"}
Connection = psycopg.Connection[TupleRow]


@pytest.fixture
def key() -> str:
    """Return an unused key."""
    return str(uuid.uuid4())


@pytest.fixture(scope="module")
def other_service(service: Service, tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[Service]:
    """Run a second service on the same database."""
    assert service
    running = Service(tmp_path_factory.mktemp("other") / "log", DATABASE_URL=database_url, WEB_CONCURRENCY=2).wait()
    yield running
    assert running.stop() == 0


def create_with_key(client: httpx.Client, key: str | bytes, task: object = TASK) -> httpx.Response:
    """Create a task with an idempotency key and return the response."""
    return client.post(
        "/api/tasks", json=task, headers={b"Idempotency-Key": key.encode() if isinstance(key, str) else key}
    )


def replayed_parts(response: httpx.Response) -> tuple[int, bytes, str, str]:
    """Return the parts of a response that the response to a retry repeats."""
    return response.status_code, response.content, response.headers["Location"], response.headers["ETag"]


def task_count(db: Connection) -> int:
    """Return the number of stored tasks."""
    row = db.execute("SELECT count(*) FROM tasks").fetchone()
    assert row
    count: int = row[0]
    return count


def stored_keys(db: Connection) -> set[str]:
    """Return the stored keys."""
    return {key for (key,) in db.execute("SELECT key FROM idempotency_keys")}


@pytest.mark.parametrize("task", [TASK, {"title": "x"}, {"title": "x", "description": None}, {"title": "é\\\"'% "}])
def test_a_retry_returns_the_first_response_and_creates_nothing(
    client: httpx.Client, db: Connection, key: str, task: dict[str, Any]
) -> None:
    first = create_with_key(client, key, task)
    assert first.status_code == 201
    assert [replayed_parts(create_with_key(client, key, task)) for _ in range(3)] == [replayed_parts(first)] * 3
    assert client.get(first.headers["Location"]).content == first.content
    assert task_count(db) == 1
    without_key = client.post("/api/tasks", json=task).json()
    assert list(without_key) == list(first.json())
    assert without_key | {"id": 0, "created_at": "", "updated_at": ""} == first.json() | {
        "id": 0,
        "created_at": "",
        "updated_at": "",
    }


def test_a_late_retry_neither_undoes_a_change_nor_restores_a_deleted_task(
    client: httpx.Client, db: Connection, key: str
) -> None:
    first = create_with_key(client, key)
    path = first.headers["Location"]
    changed = client.patch(path, json={"title": "Buy bread"})
    assert replayed_parts(create_with_key(client, key)) == replayed_parts(first)
    assert client.get(path).json() == changed.json()
    toggled = client.post(f"{path}/toggle")
    assert replayed_parts(create_with_key(client, key)) == replayed_parts(first)
    assert client.get(path).json() == toggled.json()
    assert client.delete(path).status_code == 200
    assert replayed_parts(create_with_key(client, key)) == replayed_parts(first)
    assert client.get(path).status_code == 404
    assert task_count(db) == 0


@pytest.mark.parametrize(
    "other_task",
    [
        {"title": "Buy milk "},
        {"title": "Buy milk", "description": None},
        {"title": "Buy milk", "completed": False},
        {"title": "BUY MILK"},
    ],
)
def test_another_body_with_the_same_key_returns_422_and_creates_nothing(
    client: httpx.Client, db: Connection, key: str, other_task: dict[str, Any]
) -> None:
    first = create_with_key(client, key, {"title": "Buy milk"})
    response = create_with_key(client, key, other_task)
    assert_problem(response, 422, "idempotency_key_reused")
    assert {"ETag", "Location"}.isdisjoint(response.headers)
    assert replayed_parts(create_with_key(client, key, {"title": "Buy milk"})) == replayed_parts(first)
    assert task_count(db) == 1


def test_different_spellings_of_the_same_json_are_the_same_body(client: httpx.Client, db: Connection, key: str) -> None:
    bodies: list[str | bytes] = [
        json.dumps(TASK),
        json.dumps(TASK, indent=4),
        json.dumps(dict(reversed(TASK.items())), separators=(",", ":")),
        rb'{"title": "\u0042uy milk", "description": "2 litres", "completed": true}',
    ]
    headers = JSON | {"Idempotency-Key": key}
    assert len({replayed_parts(client.post("/api/tasks", content=body, headers=headers)) for body in bodies}) == 1
    assert task_count(db) == 1


@pytest.mark.parametrize("invalid_key", ["", "x" * 256, "x" * 5000])
def test_an_empty_or_too_long_key_returns_400(client: httpx.Client, db: Connection, invalid_key: str) -> None:
    problem = assert_problem(create_with_key(client, invalid_key), 400, "malformed_request")
    assert "Idempotency-Key" in problem["detail"]
    assert (task_count(db), stored_keys(db)) == (0, set())


@pytest.mark.parametrize(
    "valid_key", ["x", "x" * 255, "'; DROP TABLE tasks; --", '%s {} \\ "', "a, b", "é".encode(), b"\xff"]
)
def test_any_other_key_is_accepted(client: httpx.Client, db: Connection, valid_key: str | bytes) -> None:
    first = create_with_key(client, valid_key)
    assert first.status_code == 201
    assert replayed_parts(create_with_key(client, valid_key)) == replayed_parts(first)
    assert task_count(db) == 1


def test_similar_keys_are_different_keys(client: httpx.Client, db: Connection) -> None:
    for key in ("key", "Key", "key1", "k"):
        assert create_with_key(client, key).status_code == 201
    assert task_count(db) == 4


def test_a_failed_request_does_not_use_its_key(client: httpx.Client, db: Connection, key: str) -> None:
    headers = JSON | {"Idempotency-Key": key}
    assert_problem(create_with_key(client, key, {"title": ""}), 400, "validation_error")
    assert_problem(client.post("/api/tasks", content=b"{", headers=headers), 400, "malformed_request")
    assert client.post("/api/tasks", content=b"{}", headers={"Idempotency-Key": key}).status_code == 415
    assert client.post("/api/tasks", content=b" " * 70_000, headers=headers).status_code == 413
    assert stored_keys(db) == set()
    assert create_with_key(client, key).status_code == 201


def send_concurrently(
    service: Service, other_service: Service, key: str, task_of: Callable[[int], dict[str, Any]]
) -> list[httpx.Response]:
    """Send 50 concurrent requests with one key, alternately to two services, and return the responses."""
    urls = [service.url, other_service.url]
    return at_once(
        service,
        50,
        lambda own_client, n: own_client.post(
            f"{urls[n % 2]}/api/tasks", json=task_of(n), headers={"Idempotency-Key": key}
        ),
    )


def test_concurrent_retries_on_two_services_create_one_task_and_get_one_response(
    service: Service, other_service: Service, db: Connection, key: str
) -> None:
    responses = send_concurrently(service, other_service, key, lambda _: TASK)
    assert Counter(response.status_code for response in responses) == {201: 50}
    assert len({replayed_parts(response) for response in responses}) == 1
    assert task_count(db) == 1


def test_of_concurrent_requests_with_different_bodies_one_creates_and_the_others_get_422(
    service: Service, other_service: Service, db: Connection, key: str
) -> None:
    responses = send_concurrently(service, other_service, key, lambda n: {"title": f"{n}"})
    assert Counter(response.status_code for response in responses) == {201: 1, 422: 49}
    [created] = [response for response in responses if response.status_code == 201]
    assert db.execute("SELECT title FROM tasks").fetchall() == [(created.json()["title"],)]


def test_later_calls_delete_keys_older_than_24_hours_and_keep_newer_ones(client: httpx.Client, db: Connection) -> None:
    old_keys, new_keys = {f"old {n}" for n in range(25)}, {f"new {n}" for n in range(5)}
    for key in old_keys | new_keys:
        create_with_key(client, key)
    set_age = "UPDATE idempotency_keys SET created_at = now() - %s::interval WHERE starts_with(key, %s)"
    db.execute(set_age, ["24 hours 1 second", "old"])
    db.execute(set_age, ["23 hours 59 minutes", "new"])
    count_before = task_count(db)
    remaining = len(old_keys)
    while remaining:
        assert create_with_key(client, f"call {remaining}").status_code == 201
        remaining_after = len(stored_keys(db) & old_keys)
        assert remaining_after < remaining
        remaining = remaining_after
    assert new_keys <= stored_keys(db)
    for key in new_keys:
        assert create_with_key(client, key).status_code == 201
    assert task_count(db) == count_before + len(stored_keys(db) - new_keys)
    assert create_with_key(client, "old 1").status_code == 201
    assert task_count(db) == count_before + len(stored_keys(db) - new_keys)


def test_a_retry_with_an_expired_key_that_is_still_stored_returns_the_first_response(
    client: httpx.Client, db: Connection, key: str
) -> None:
    first = create_with_key(client, key)
    db.execute("UPDATE idempotency_keys SET created_at = created_at - interval '25 hours'")
    retried = create_with_key(client, key)
    assert (retried.status_code, retried.json()["id"], task_count(db)) == (201, first.json()["id"], 1)


def test_concurrent_calls_delete_expired_keys_without_an_error(
    service: Service, client: httpx.Client, db: Connection
) -> None:
    for n in range(40):
        create_with_key(client, f"old {n}")
    db.execute("UPDATE idempotency_keys SET created_at = now() - interval '25 hours'")
    # Half of these calls use a key that another call may be deleting.
    responses = at_once(
        service, 50, lambda own_client, n: create_with_key(own_client, f"old {n // 2}" if n % 2 else f"new {n}")
    )
    assert Counter(response.status_code for response in responses) == {201: 50}


@pytest.mark.parametrize("psql", PSQLS)
def test_psql_creates_once_too(psql: str, client: httpx.Client, db: Connection, conninfo: str, key: str) -> None:
    parameters = {"idempotency_key": key, "task": json.dumps(TASK)}
    [first] = rows_of(conninfo, "create_once", psql, **parameters)
    assert rows_of(conninfo, "create_once", psql, **parameters) == [first]
    assert (
        comparable(create_with_key(client, key).json())
        == first
        == comparable(client.get(f"/api/tasks/{first['id']}").json())
    )
    assert rows_of(conninfo, "create_once", psql, idempotency_key=key, task='{"title": "another"}') == []
    assert task_count(db) == 1
    for invalid_key in ("", "x" * 256):
        result = run_psql(
            conninfo, "sql/tasks/create_once.sql", {**parameters, "idempotency_key": invalid_key}, psql=psql
        )
        assert (result.returncode, "key_is_1_to_255_characters" in result.stderr) == (3, True)
    result = run_psql(
        conninfo, "sql/tasks/create_once.sql", {"idempotency_key": "other", "task": '{"title": " "}'}, psql=psql
    )
    assert (result.returncode, task_count(db), stored_keys(db)) == (3, 1, {key})


@pytest.mark.parametrize("psql", PSQLS)
def test_the_keys_of_different_users_are_independent(
    psql: str, client: httpx.Client, db: Connection, conninfo: str, key: str
) -> None:
    own = create_with_key(client, key)
    parameters = {"idempotency_key": key, "user_id": "other"}
    [other] = rows_of(conninfo, "create_once", psql, task='{"title": "theirs"}', **parameters)
    assert (other["user_id"], other["id"] != own.json()["id"]) == ("other", True)
    assert rows_of(conninfo, "create_once", psql, task='{"title": "theirs"}', **parameters) == [other]
    assert replayed_parts(create_with_key(client, key)) == replayed_parts(own)
    assert task_count(db) == 2
