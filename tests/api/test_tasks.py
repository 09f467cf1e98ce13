"""The six calls under /api/tasks, as the table in the README describes them."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.fixtures import Create
from tests.support.problems import assert_problem

FIELDS = ["id", "title", "description", "completed", "user_id", "version", "created_at", "updated_at"]
LARGEST_ID = 2**63 - 1


def without_times(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task without its times, which depend on the clock."""
    return {name: value for name, value in task.items() if name not in {"created_at", "updated_at"}}


def test_create_returns_201_with_the_task_and_its_location(client: httpx.Client) -> None:
    response = client.post("/api/tasks", json={"title": "Buy milk"})
    task = response.json()
    assert response.status_code == 201
    assert response.headers["Content-Type"] == "application/json"
    assert list(task) == FIELDS
    assert without_times(task) == {
        "id": task["id"],
        "title": "Buy milk",
        "description": None,
        "completed": False,
        "user_id": "local",
        "version": 1,
    }
    assert response.headers["Location"] == f"/api/tasks/{task['id']}"
    assert client.get(response.headers["Location"]).json() == task


def test_create_accepts_every_field_that_a_client_may_set(create: Create) -> None:
    task = create("Buy milk", description="two litres", completed=True)
    assert (task["title"], task["description"], task["completed"]) == ("Buy milk", "two litres", True)


def test_times_are_rfc_3339_in_utc(create: Create) -> None:
    before = datetime.now(UTC)
    task = create()
    assert task["created_at"] == task["updated_at"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?\+00:00", task["created_at"])
    assert abs((datetime.fromisoformat(task["created_at"]) - before).total_seconds()) < 60


@pytest.mark.parametrize(
    "title",
    [
        "  spaces kept  ",
        "e\u0301 is not \u00e9",
        "\u00e9",
        "\U0001f95b" * 200,
        "\u200b",
        "a\tb\nc",
        "100 % \\ ' \" ; -- /* :x :'y' %(z)s {} $1",
        "\x01\x7f\uffff",
        "<script>alert(1)</script>",
        "\u202eright to left",
    ],
)
def test_text_is_stored_unchanged(client: httpx.Client, create: Create, title: str) -> None:
    task = create(title, description=title)
    stored = client.get(f"/api/tasks/{task['id']}").json()
    assert (task["title"], stored["title"], stored["description"]) == (title, title, title)


@pytest.mark.parametrize("description", [None, "", " ", "x" * 2000, "\U0001f95b" * 2000])
def test_a_description_is_stored_unchanged_even_if_null_or_empty(
    client: httpx.Client, create: Create, description: str | None
) -> None:
    task = create(description=description)
    assert client.get(f"/api/tasks/{task['id']}").json()["description"] == description


@pytest.mark.usefixtures("db")
def test_list_returns_an_empty_array_if_there_are_no_tasks(client: httpx.Client) -> None:
    response = client.get("/api/tasks")
    assert (response.status_code, response.headers["Content-Type"], response.text) == (200, "application/json", "[]")


def test_list_returns_every_task_newest_first(
    client: httpx.Client, db: psycopg.Connection[TupleRow], create: Create
) -> None:
    tasks = [create(f"task {n}") for n in range(5)]
    assert client.get("/api/tasks").json() == tasks[::-1]
    db.execute("UPDATE tasks SET created_at = '2026-01-01', updated_at = '2026-01-01'")
    assert [task["id"] for task in client.get("/api/tasks").json()] == [task["id"] for task in tasks[::-1]]
    db.execute("UPDATE tasks SET created_at = '2025-01-01' WHERE id = %s", [tasks[-1]["id"]])
    assert client.get("/api/tasks").json()[-1]["id"] == tasks[-1]["id"]


def test_list_returns_at_most_10000_tasks(client: httpx.Client, db: psycopg.Connection[TupleRow]) -> None:
    db.execute("INSERT INTO tasks (user_id, title) SELECT 'local', 'task' FROM generate_series(1, 10001)")
    tasks = client.get("/api/tasks").json()
    db.execute("DELETE FROM tasks")
    assert len(tasks) == 10_000
    assert all(list(task) == FIELDS for task in tasks)


def test_get_returns_the_task(client: httpx.Client, create: Create) -> None:
    task = create()
    response = client.get(f"/api/tasks/{task['id']}")
    assert (response.status_code, response.json()) == (200, task)


def test_patch_changes_only_the_given_fields(client: httpx.Client, create: Create) -> None:
    task = create(description="two litres")
    changed = client.patch(f"/api/tasks/{task['id']}", json={"title": "Buy oat milk"})
    assert changed.status_code == 200
    assert without_times(changed.json()) == without_times(task) | {"title": "Buy oat milk", "version": 2}
    again = client.patch(f"/api/tasks/{task['id']}", json={"completed": True}).json()
    assert without_times(again) == without_times(changed.json()) | {"completed": True, "version": 3}
    assert client.get(f"/api/tasks/{task['id']}").json() == again


def test_patch_sets_a_null_and_an_empty_description(client: httpx.Client, create: Create) -> None:
    path = f"/api/tasks/{create(description='two litres')['id']}"
    assert client.patch(path, json={"description": ""}).json()["description"] == ""
    assert client.patch(path, json={"description": None}).json()["description"] is None


def test_patch_accepts_json_merge_patch(client: httpx.Client, create: Create) -> None:
    path = f"/api/tasks/{create()['id']}"
    headers = {"Content-Type": "application/merge-patch+json; charset=utf-8"}
    changed = client.patch(path, content=json.dumps({"completed": True}), headers=headers)
    assert (changed.status_code, changed.json()["completed"]) == (200, True)


def test_patch_that_changes_nothing_keeps_the_version(client: httpx.Client, create: Create) -> None:
    task = create(description="two litres")
    path = f"/api/tasks/{task['id']}"
    assert client.patch(path, json={}).json() == task
    same = {"title": task["title"], "description": task["description"], "completed": task["completed"]}
    assert client.patch(path, json=same).json() == task


def test_toggle_flips_completed_and_needs_no_body(client: httpx.Client, create: Create) -> None:
    task = create()
    once = client.post(f"/api/tasks/{task['id']}/toggle")
    assert once.status_code == 200
    assert without_times(once.json()) == without_times(task) | {"completed": True, "version": 2}
    twice = client.post(f"/api/tasks/{task['id']}/toggle", content=b"{}")
    assert without_times(twice.json()) == without_times(task) | {"version": 3}


def test_delete_returns_the_deleted_task(client: httpx.Client, create: Create) -> None:
    task = create()
    changed = client.post(f"/api/tasks/{task['id']}/toggle").json()
    deleted = client.delete(f"/api/tasks/{task['id']}")
    assert (deleted.status_code, deleted.json()) == (200, changed)
    assert_problem(client.delete(f"/api/tasks/{task['id']}"), 404, "not_found")
    assert_problem(client.get(f"/api/tasks/{task['id']}"), 404, "not_found")


def test_updated_at_strictly_increases_even_if_the_clock_does_not(
    client: httpx.Client, db: psycopg.Connection[TupleRow], create: Create
) -> None:
    task = create()
    path = f"/api/tasks/{task['id']}"
    db.execute("UPDATE tasks SET updated_at = '2999-01-01' WHERE id = %s", [task["id"]])
    times = [
        client.patch(path, json={"title": "later"}).json()["updated_at"],
        client.post(f"{path}/toggle").json()["updated_at"],
        client.patch(path, json={"completed": False}).json()["updated_at"],
    ]
    assert times == [f"2999-01-01T00:00:00.00000{n}+00:00" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "task_id",
    [
        "0",
        "-1",
        "1.0",
        "1e3",
        "abc",
        "007",
        "+1",
        "%31x",
        "\u0661",  # an Arabic digit
        LARGEST_ID,
        LARGEST_ID + 1,
        10**30,
        "9" * 3000,
        "%00",
        "%20",
    ],
)
@pytest.mark.parametrize(
    ("method", "suffix", "body"),
    [("GET", "", None), ("PATCH", "", {"title": "x"}), ("DELETE", "", None), ("POST", "/toggle", None)],
)
def test_an_unknown_or_invalid_id_returns_404(
    client: httpx.Client, task_id: object, method: str, suffix: str, body: dict[str, str] | None
) -> None:
    assert_problem(client.request(method, f"/api/tasks/{task_id}{suffix}", json=body), 404, "not_found")


def test_tasks_of_another_user_cannot_be_read_or_changed(
    client: httpx.Client, db: psycopg.Connection[TupleRow]
) -> None:
    row = db.execute("INSERT INTO tasks (user_id, title) VALUES ('another', 'private') RETURNING id").fetchone()
    assert row
    path = f"/api/tasks/{row[0]}"
    assert client.get("/api/tasks").json() == []
    for response in (
        client.get(path),
        client.patch(path, json={"title": "mine"}),
        client.post(f"{path}/toggle"),
        client.delete(path),
    ):
        assert_problem(response, 404, "not_found")
    assert db.execute("SELECT title, completed, version FROM tasks").fetchall() == [("private", False, 1)]


@pytest.mark.parametrize("path", ["/api/tasks", "/healthz", "/readyz", "/docs"])
def test_head_responds_like_get_but_without_a_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.headers["Content-Type"], head.content) == (200, get.headers["Content-Type"], b"")
