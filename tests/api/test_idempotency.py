"""Idempotency-Key: a create that is sent again gets its first answer again and creates nothing more."""

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
Database = psycopg.Connection[TupleRow]


@pytest.fixture
def key() -> str:
    """Give a key that nobody used."""
    return str(uuid.uuid4())


@pytest.fixture(scope="module")
def other_service(service: Service, tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[Service]:
    """Run another service on the same database."""
    assert service
    running = Service(tmp_path_factory.mktemp("other") / "log", DATABASE_URL=database_url, WEB_CONCURRENCY=2).wait()
    yield running
    assert running.stop() == 0


def post(client: httpx.Client, key: str | bytes, task: object = TASK) -> httpx.Response:
    """Create a task with a key."""
    return client.post(
        "/api/tasks", json=task, headers={b"Idempotency-Key": key.encode() if isinstance(key, str) else key}
    )


def what(answer: httpx.Response) -> tuple[int, bytes, str, str]:
    """Give what of an answer is replayed."""
    return answer.status_code, answer.content, answer.headers["Location"], answer.headers["ETag"]


def count(db: Database) -> int:
    """Count the tasks."""
    row = db.execute("SELECT count(*) FROM tasks").fetchone()
    assert row
    number: int = row[0]
    return number


def keys(db: Database) -> set[str]:
    """Give the keys that are kept."""
    return {name for (name,) in db.execute("SELECT key FROM idempotency_keys")}


@pytest.mark.parametrize("task", [TASK, {"title": "x"}, {"title": "x", "description": None}, {"title": "é\\\"'% "}])
def test_a_retry_gets_the_first_answer_and_creates_nothing(
    client: httpx.Client, db: Database, key: str, task: dict[str, Any]
) -> None:
    first = post(client, key, task)
    assert first.status_code == 201
    assert [what(post(client, key, task)) for _ in range(3)] == [what(first)] * 3
    assert client.get(first.headers["Location"]).content == first.content
    assert count(db) == 1
    without = client.post("/api/tasks", json=task).json()
    assert list(without) == list(first.json())
    assert without | {"id": 0, "created_at": "", "updated_at": ""} == first.json() | {
        "id": 0,
        "created_at": "",
        "updated_at": "",
    }


def test_a_late_retry_undoes_nothing_and_brings_nothing_back(client: httpx.Client, db: Database, key: str) -> None:
    first = post(client, key)
    path = first.headers["Location"]
    changed = client.patch(path, json={"title": "Buy bread"})
    assert what(post(client, key)) == what(first)
    assert client.get(path).json() == changed.json()
    toggled = client.post(f"{path}/toggle")
    assert what(post(client, key)) == what(first)
    assert client.get(path).json() == toggled.json()
    assert client.delete(path).status_code == 200
    assert what(post(client, key)) == what(first)
    assert client.get(path).status_code == 404
    assert count(db) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"title": "Buy milk "},
        {"title": "Buy milk", "description": None},
        {"title": "Buy milk", "completed": False},
        {"title": "BUY MILK"},
    ],
)
def test_another_body_under_the_same_key_is_422_and_stores_nothing(
    client: httpx.Client, db: Database, key: str, other: dict[str, Any]
) -> None:
    first = post(client, key, {"title": "Buy milk"})
    answer = post(client, key, other)
    assert_problem(answer, 422, "idempotency_key_reused")
    assert {"ETag", "Location"}.isdisjoint(answer.headers)
    assert what(post(client, key, {"title": "Buy milk"})) == what(first)
    assert count(db) == 1


def test_bodies_that_are_the_same_json_are_the_same(client: httpx.Client, db: Database, key: str) -> None:
    bodies: list[str | bytes] = [
        json.dumps(TASK),
        json.dumps(TASK, indent=4),
        json.dumps(dict(reversed(TASK.items())), separators=(",", ":")),
        rb'{"title": "\u0042uy milk", "description": "2 litres", "completed": true}',
    ]
    headers = JSON | {"Idempotency-Key": key}
    assert len({what(client.post("/api/tasks", content=body, headers=headers)) for body in bodies}) == 1
    assert count(db) == 1


@pytest.mark.parametrize("wrong", ["", "x" * 256, "x" * 5000])
def test_a_key_that_is_empty_or_too_long_is_400(client: httpx.Client, db: Database, wrong: str) -> None:
    problem = assert_problem(post(client, wrong), 400, "malformed_request")
    assert "Idempotency-Key" in problem["detail"]
    assert (count(db), keys(db)) == (0, set())


@pytest.mark.parametrize(
    "good", ["x", "x" * 255, "'; DROP TABLE tasks; --", '%s {} \\ "', "a, b", "é".encode(), b"\xff"]
)
def test_any_other_key_is_good(client: httpx.Client, db: Database, good: str | bytes) -> None:
    first = post(client, good)
    assert first.status_code == 201
    assert what(post(client, good)) == what(first)
    assert count(db) == 1


def test_keys_differ_in_any_character(client: httpx.Client, db: Database) -> None:
    for key in ("key", "Key", "key1", "k"):
        assert post(client, key).status_code == 201
    assert count(db) == 4


def test_a_request_that_failed_does_not_use_up_its_key(client: httpx.Client, db: Database, key: str) -> None:
    headers = JSON | {"Idempotency-Key": key}
    assert_problem(post(client, key, {"title": ""}), 400, "validation_error")
    assert_problem(client.post("/api/tasks", content=b"{", headers=headers), 400, "malformed_request")
    assert client.post("/api/tasks", content=b"{}", headers={"Idempotency-Key": key}).status_code == 415
    assert client.post("/api/tasks", content=b" " * 70_000, headers=headers).status_code == 413
    assert keys(db) == set()
    assert post(client, key).status_code == 201


def race(
    service: Service, other_service: Service, key: str, task_of: Callable[[int], dict[str, Any]]
) -> list[httpx.Response]:
    """Send 50 requests with one key at once, to two services in turn."""
    urls = [service.url, other_service.url]
    return at_once(
        service,
        50,
        lambda racer, n: racer.post(f"{urls[n % 2]}/api/tasks", json=task_of(n), headers={"Idempotency-Key": key}),
    )


def test_of_50_racing_requests_on_two_services_one_creates_and_all_get_its_answer(
    service: Service, other_service: Service, db: Database, key: str
) -> None:
    answers = race(service, other_service, key, lambda _: TASK)
    assert Counter(answer.status_code for answer in answers) == {201: 50}
    assert len({what(answer) for answer in answers}) == 1
    assert count(db) == 1


def test_of_50_racing_requests_with_other_bodies_one_creates_and_the_others_are_422(
    service: Service, other_service: Service, db: Database, key: str
) -> None:
    answers = race(service, other_service, key, lambda n: {"title": f"{n}"})
    assert Counter(answer.status_code for answer in answers) == {201: 1, 422: 49}
    [won] = [answer for answer in answers if answer.status_code == 201]
    assert db.execute("SELECT title FROM tasks").fetchall() == [(won.json()["title"],)]


def test_keys_of_more_than_a_day_are_cleared_by_later_calls_and_younger_ones_kept(
    client: httpx.Client, db: Database
) -> None:
    old, young = {f"old {n}" for n in range(25)}, {f"young {n}" for n in range(5)}
    for key in old | young:
        post(client, key)
    age = "UPDATE idempotency_keys SET created_at = now() - %s::interval WHERE starts_with(key, %s)"
    db.execute(age, ["24 hours 1 second", "old"])
    db.execute(age, ["23 hours 59 minutes", "young"])
    tasks = count(db)
    left = len(old)
    while left:
        assert post(client, f"call {left}").status_code == 201
        fewer = len(keys(db) & old)
        assert fewer < left
        left = fewer
    assert young <= keys(db)
    for key in young:
        assert post(client, key).status_code == 201
    assert count(db) == tasks + len(keys(db) - young)
    assert post(client, "old 1").status_code == 201
    assert count(db) == tasks + len(keys(db) - young)


def test_a_retry_with_an_old_key_that_is_still_there_gets_the_first_answer(
    client: httpx.Client, db: Database, key: str
) -> None:
    first = post(client, key)
    db.execute("UPDATE idempotency_keys SET created_at = created_at - interval '25 hours'")
    again = post(client, key)
    assert (again.status_code, again.json()["id"], count(db)) == (201, first.json()["id"], 1)


def test_50_racing_calls_clear_old_keys_without_a_failure(service: Service, client: httpx.Client, db: Database) -> None:
    for n in range(40):
        post(client, f"old {n}")
    db.execute("UPDATE idempotency_keys SET created_at = now() - interval '25 hours'")
    # Half of them come with a key that the others may be clearing.
    answers = at_once(service, 50, lambda racer, n: post(racer, f"old {n // 2}" if n % 2 else f"new {n}"))
    assert Counter(answer.status_code for answer in answers) == {201: 50}


@pytest.mark.parametrize("psql", PSQLS)
def test_psql_creates_once_too(psql: str, client: httpx.Client, db: Database, conninfo: str, key: str) -> None:
    given = {"idempotency_key": key, "task": json.dumps(TASK)}
    [first] = rows_of(conninfo, "create_once", psql, **given)
    assert rows_of(conninfo, "create_once", psql, **given) == [first]
    assert comparable(post(client, key).json()) == first == comparable(client.get(f"/api/tasks/{first['id']}").json())
    assert rows_of(conninfo, "create_once", psql, idempotency_key=key, task='{"title": "another"}') == []
    assert count(db) == 1
    for wrong in ("", "x" * 256):
        done = run_psql(conninfo, "sql/tasks/create_once.sql", {**given, "idempotency_key": wrong}, psql=psql)
        assert (done.returncode, "key_is_1_to_255_characters" in done.stderr) == (3, True)
    done = run_psql(
        conninfo, "sql/tasks/create_once.sql", {"idempotency_key": "other", "task": '{"title": " "}'}, psql=psql
    )
    assert (done.returncode, count(db), keys(db)) == (3, 1, {key})


@pytest.mark.parametrize("psql", PSQLS)
def test_each_user_has_keys_of_their_own(
    psql: str, client: httpx.Client, db: Database, conninfo: str, key: str
) -> None:
    ours = post(client, key)
    given = {"idempotency_key": key, "user_id": "other"}
    [theirs] = rows_of(conninfo, "create_once", psql, task='{"title": "theirs"}', **given)
    assert (theirs["user_id"], theirs["id"] != ours.json()["id"]) == ("other", True)
    assert rows_of(conninfo, "create_once", psql, task='{"title": "theirs"}', **given) == [theirs]
    assert what(post(client, key)) == what(ours)
    assert count(db) == 2
