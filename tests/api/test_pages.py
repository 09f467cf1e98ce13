"""Lists: filters, pages that contain each task exactly once, and a link if there are more tasks."""

import re
from itertools import product
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.fixtures import Create
from tests.support.pages import SEED, Row, link_of, pages
from tests.support.problems import assert_problem
from tests.support.psql import PSQLS, comparable, rows_of


def ids_of(tasks: list[Row]) -> list[int]:
    """Return the ids of tasks, in their order."""
    return [task["id"] for task in tasks]


@pytest.fixture
def seeded(db: psycopg.Connection[TupleRow], client: httpx.Client) -> list[Row]:
    """Store 20 tasks, some with the same creation time, and return them in the order of the list."""
    db.execute(SEED, {"count": 20})
    response = client.get("/api/tasks")
    assert "Link" not in response.headers
    tasks: list[Row] = response.json()
    expected = db.execute("SELECT id FROM tasks ORDER BY created_at DESC, id DESC").fetchall()
    assert ids_of(tasks) == [task_id for (task_id,) in expected]
    assert len({task["created_at"] for task in tasks}) == 7
    return tasks


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10_000])
def test_links_lead_to_every_task_once_and_in_order(client: httpx.Client, seeded: list[Row], limit: int) -> None:
    listed = list(pages(client, limit=limit))
    assert [task for page in listed for task in page] == seeded
    assert [len(page) for page in listed[:-1]] == [limit] * (len(listed) - 1)
    assert listed[-1]


def test_a_page_of_several_arrays_of_4000_tasks_has_each_task_once(
    db: psycopg.Connection[TupleRow], client: httpx.Client
) -> None:
    db.execute(SEED, {"count": 8001})
    expected = client.get("/api/tasks").json()
    assert len({task["id"] for task in expected}) == 8001
    for limit in (3999, 4000, 4001, 7999, 8000, 8001):
        listed = list(pages(client, limit=limit))
        assert [len(page) for page in listed[:-1]] == [limit] * (len(listed) - 1)
        assert [task for page in listed for task in page] == expected


@pytest.mark.parametrize("limit", [1, 19, 20, 21])
def test_a_page_has_a_link_only_if_there_are_more_tasks(client: httpx.Client, seeded: list[Row], limit: int) -> None:
    response = client.get(f"/api/tasks?limit={limit}")
    assert response.json() == seeded[:limit]
    assert bool(link_of(response)) is (limit < 20)


@pytest.mark.parametrize(
    ("completed", "q", "limit"), [*product([None, "true", "false"], [None, "milk"], [None, 1, 2, 50])]
)
def test_filters_combine_and_links_keep_them(
    client: httpx.Client, seeded: list[Row], completed: str | None, q: str | None, limit: int | None
) -> None:
    query: dict[str, object] = {}
    expected = seeded
    if completed is not None:
        query["completed"] = completed
        expected = [task for task in expected if task["completed"] is (completed == "true")]
    if q is not None:
        query["q"] = q
        expected = [task for task in expected if q in f"{task['title']} {task['description']}".lower()]
    if limit is not None:
        query["limit"] = limit
    assert expected
    assert [task for page in pages(client, **query) for task in page] == expected
    link = link_of(client.get(f"/api/tasks?{urlencode(query)}"))
    assert bool(link) is (limit in {1, 2})
    if link:
        kept = dict(parse_qsl(urlsplit(link).query, strict_parsing=True))
        assert re.fullmatch("[0-9]+_[0-9]+", kept.pop("after"))
        assert kept == {name: str(value) for name, value in query.items()}


def test_a_list_without_matching_tasks_is_empty(client: httpx.Client, seeded: list[Row]) -> None:
    assert seeded
    for query in ("q=nowhere", "completed=true&q=nowhere", "after=0_1"):
        response = client.get(f"/api/tasks?{query}")
        assert (response.text, "Link" in response.headers) == ("[]", False)


@pytest.mark.usefixtures("db")
@pytest.mark.parametrize(
    "q", ["a&limit=1", "100%", "1+1 = 2", "\U0001f95b <milk>", '"; rel="prev"', "%41", "a;b#c/d?e", " ", "é,\\"]
)
def test_links_keep_any_character_of_q(client: httpx.Client, create: Create, q: str) -> None:
    tasks = [create(f"x{q}x") for _ in range(3)][::-1]
    create("another")
    assert [task for page in pages(client, q=q, limit=1) for task in page] == tasks


def test_no_task_is_skipped_or_repeated_during_other_writes(
    client: httpx.Client, create: Create, seeded: list[Row]
) -> None:
    listed_ids: list[int] = []
    seeded_ids = ids_of(seeded)
    deleted_ids: set[int] = set()
    for page in pages(client, limit=3):
        listed_ids += ids_of(page)
        create("newer than every page")
        remaining_ids = [task_id for task_id in seeded_ids if task_id not in {*listed_ids, *deleted_ids}]
        # The last task of this page, from which the cursor is made, and a task of a later page.
        for task_id in [listed_ids[-1], *remaining_ids[1:2]]:
            assert client.delete(f"/api/tasks/{task_id}").status_code == httpx.codes.OK
        deleted_ids.update(remaining_ids[1:2])
        if remaining_ids:
            assert client.post(f"/api/tasks/{remaining_ids[0]}/toggle").status_code == httpx.codes.OK
    assert listed_ids == [task_id for task_id in seeded_ids if task_id not in deleted_ids]


def test_a_cursor_works_if_its_task_is_deleted_or_shares_its_creation_time(
    client: httpx.Client, seeded: list[Row], db: psycopg.Connection[TupleRow]
) -> None:
    for last in range(19):
        link = link_of(client.get(f"/api/tasks?limit={last + 1}"))
        assert link
        rest = client.get(link.replace(f"limit={last + 1}", "limit=100")).json()
        assert rest == seeded[last + 1 :]
    link = link_of(client.get("/api/tasks?limit=4"))
    assert link
    db.execute("DELETE FROM tasks WHERE id = ANY(%s)", [ids_of(seeded[:4])])
    assert client.get(link).json() == seeded[4:8]


def test_pages_are_exact_for_every_possible_creation_time(
    client: httpx.Client, db: psycopg.Connection[TupleRow]
) -> None:
    times = [
        "0001-01-01 00:00:00+00",
        "0001-01-01 00:00:00.000001+00",
        "1969-12-31 23:59:59.999999+00",
        "1970-01-01 00:00:00+00",
        *(f"2300-01-01 00:00:00.00000{n}+00" for n in range(1, 9)),
        *(f"9999-12-31 23:59:59.99999{n}+00" for n in range(10)),
    ]
    with db.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO tasks (user_id, title, created_at, updated_at) VALUES ('local', %s, %s, %s)",
            [(time, time, times[-1]) for time in times],
        )
    assert [task["title"] for page in pages(client, limit=1) for task in page] == times[::-1]


def test_a_response_of_10_000_tasks_has_a_link_if_there_are_more(
    client: httpx.Client, db: psycopg.Connection[TupleRow]
) -> None:
    db.execute("INSERT INTO tasks (user_id, title) SELECT 'local', n FROM generate_series(1, 10001) AS n")
    for query in ("", "?limit=10000"):
        response = client.get(f"/api/tasks{query}")
        assert len(response.json()) == 10_000
        link = link_of(response)
        assert link
        assert [task["title"] for task in client.get(link).json()] == ["1"]
    db.execute("DELETE FROM tasks WHERE title = '1'")
    for query in ("", "?limit=10000"):
        response = client.get(f"/api/tasks{query}")
        assert (len(response.json()), link_of(response)) == (10_000, None)


@pytest.mark.usefixtures("db")
@pytest.mark.parametrize(
    ("q", "titles"),
    [
        ("MILK", {"Buy Milk", "described"}),
        ("ärger", {"ÄRGER"}),
        ("ÄRGER", {"ÄRGER"}),
        ("CAFÉ", {"café"}),
        ("МОЛОКО", {"молоко"}),
        ("%", {"100 %"}),
        ("_", {"snake_case"}),
        ("\\", {"back\\slash"}),
        ("e_c", {"snake_case"}),
        ("0 %", {"100 %"}),
        ("k s", set()),  # does not match across the title and the description
        (".*", set()),
        ("'", {"it's"}),
        ("", {"Buy Milk", "described", "ÄRGER", "café", "молоко", "100 %", "snake_case", "back\\slash", "it's"}),
    ],
)
def test_q_is_a_case_insensitive_substring_of_the_title_or_the_description(
    client: httpx.Client, create: Create, q: str, titles: set[str]
) -> None:
    for title in ("ÄRGER", "café", "молоко", "100 %", "snake_case", "back\\slash", "it's"):
        create(title)
    create("Buy Milk", description="some")
    create("described", description="two litres of mIlK")
    assert {task["title"] for task in client.get("/api/tasks", params={"q": q}).json()} == titles


INVALID_LIMITS = ["0", "10001", "-1", "abc", "1.5", "+5", "5_0", "\u0665", "", " 5", "5 ", "1e1", "0x5", "9" * 30, "\0"]
INVALID_COMPLETED = ["yes", "1", "0", "TRUE", "True", "", "null", "true "]
INVALID_AFTER = [
    *("", "garbage", "1", "1_", "_1", "1_1_1", "1 _1", "+1_1", "1_-1", "1.5_1", "\u0665_1", "1_1\n", "1'_1"),
    *("infinity_1", "\0", f"1_{2**63}", f"{2**63}_1", f"{10**18}_1", f"-{2**63}_1", f"-{10**17}_1", f"{'9' * 400}_1"),
]


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        *(("limit", value) for value in INVALID_LIMITS),
        *(("completed", value) for value in INVALID_COMPLETED),
        *(("after", value) for value in INVALID_AFTER),
        ("q", "a\0b"),
        ("q", "[" * 251),
        ("offset", "1"),
        ("Limit", "5"),
        ("", "5"),
    ],
)
def test_an_invalid_parameter_is_named(client: httpx.Client, parameter: str, value: str) -> None:
    query = {"limit": "5", "completed": "true", "q": "milk", "after": "0_1", parameter: value}
    problem = assert_problem(client.get(f"/api/tasks?{urlencode(query)}"), 400, "validation_error")
    assert [error["parameter"] for error in problem["errors"]] == [parameter]
    assert problem["errors"][0]["detail"]


def test_every_invalid_parameter_is_named(client: httpx.Client) -> None:
    response = client.get("/api/tasks?limit=0&completed=no&after=x&q=%00&page=2")
    problem = assert_problem(response, 400, "validation_error")
    assert [error["parameter"] for error in problem["errors"]] == ["after", "completed", "limit", "page", "q"]


@pytest.mark.parametrize("query", ["limit=5&limit=5", "q=a&limit=5&limit=6", "limit=&limit="])
def test_a_repeated_parameter_is_named(client: httpx.Client, query: str) -> None:
    problem = assert_problem(client.get(f"/api/tasks?{query}"), 400, "validation_error")
    assert problem["errors"] == [{"parameter": "limit", "detail": "The parameter is repeated"}]


@pytest.mark.parametrize("query", ["q=%ff", "q=%c3", "q=%ed%a0%80", "%ff=1"])
def test_a_query_that_is_not_utf_8_is_rejected(client: httpx.Client, query: str) -> None:
    assert_problem(client.get(f"/api/tasks?{query}"), 400, "malformed_request")


@pytest.mark.parametrize("after", [f"{10**18 - 1}_{2**63 - 1}", f"-{10**17 - 1}_0", "-0_1", "0_0"])
def test_a_cursor_accepts_every_time(client: httpx.Client, seeded: list[Row], after: str) -> None:
    response = client.get(f"/api/tasks?after={after}")
    assert response.json() == (seeded if after.startswith("9") else [])


@pytest.mark.parametrize("psql", PSQLS)
def test_psql_accepts_the_same_filters(psql: str, client: httpx.Client, seeded: list[Row], conninfo: str) -> None:
    cursor = re.search("after=([0-9_]+)", link_of(client.get("/api/tasks?limit=6")) or "")
    assert cursor
    filters: list[dict[str, object]] = [{"completed": "true"}, {"q": "Milk"}, {"limit": 2}, {"after": cursor[1]}]
    for parameters in [*filters, {name: value for each in filters for name, value in each.items()}]:
        listed = client.get(f"/api/tasks?{urlencode(parameters)}").json()
        assert 0 < len(listed) < len(seeded)
        assert rows_of(conninfo, "list", psql, **parameters) == [comparable(task) for task in listed]
