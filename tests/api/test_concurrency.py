"""Concurrent calls: each one counts, and none undoes another."""

from collections import Counter

import httpx
import psycopg
from psycopg.rows import TupleRow

from tests.support.fixtures import Create
from tests.support.load import at_once
from tests.support.service import Service


def test_toggle_counts_every_concurrent_call(service: Service, client: httpx.Client, create: Create) -> None:
    path = f"/api/tasks/{create()['id']}"
    responses = at_once(service, 101, lambda client, _: client.post(f"{path}/toggle"))
    assert Counter(response.status_code for response in responses) == {200: 101}
    task = client.get(path).json()
    assert (task["completed"], task["version"]) == (True, 102)
    tasks_by_version = sorted((response.json() for response in responses), key=lambda task: int(task["version"]))
    assert [task["version"] for task in tasks_by_version] == list(range(2, 103))
    assert [task["completed"] for task in tasks_by_version] == [True, False] * 50 + [True]
    update_times = [task["updated_at"] for task in tasks_by_version]
    assert update_times == sorted(set(update_times))


def test_every_concurrent_create_creates_one_task(
    service: Service, client: httpx.Client, db: psycopg.Connection[TupleRow]
) -> None:
    responses = at_once(service, 100, lambda client, n: client.post("/api/tasks", json={"title": f"task {n}"}))
    assert Counter(response.status_code for response in responses) == {201: 100}
    assert len({response.json()["id"] for response in responses}) == 100
    titles = Counter(task["title"] for task in client.get("/api/tasks").json())
    assert titles == Counter(f"task {n}" for n in range(100))
    assert db.execute("SELECT count(*) FROM tasks").fetchone() == (100,)


def test_concurrent_patches_of_different_fields_keep_all_changes(
    service: Service, client: httpx.Client, create: Create
) -> None:
    path = f"/api/tasks/{create()['id']}"
    changes = [{"title": "changed"}, {"description": "changed"}, {"completed": True}] * 20
    responses = at_once(service, 60, lambda client, n: client.patch(path, json=changes[n]))
    assert Counter(response.status_code for response in responses) == {200: 60}
    task = client.get(path).json()
    assert (task["title"], task["description"], task["completed"]) == ("changed", "changed", True)
    assert task["version"] == 4  # three patches changed a value; the others changed nothing


def test_only_one_of_many_concurrent_deletes_returns_the_task(service: Service, create: Create) -> None:
    path = f"/api/tasks/{create()['id']}"
    responses = at_once(service, 50, lambda client, _: client.delete(path))
    assert Counter(response.status_code for response in responses) == {200: 1, 404: 49}
