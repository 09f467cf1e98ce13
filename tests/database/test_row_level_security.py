"""Users stay apart even if a statement forgets to say whose rows it is about, because the database keeps them apart."""

import json
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support import pgbouncer
from tests.support.databases import as_url, migrate, new_database
from tests.support.environment import ROOT
from tests.support.fixtures import Start
from tests.support.optional_tools import program
from tests.support.problems import assert_problem
from tests.support.service import Service
from todo_api.api.pages import FIRST_CURSOR
from todo_api.config import Settings
from todo_api.database import Database, UnavailableError, statements
from todo_api.database.statements import Statement

ROLE = Settings.database_role
LOADED = statements.load()
CONDITION = re.compile(r"(old\.)?user_id = :'user_id'::text")
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "sql" / "tasks").glob("*.sql"))}
FORGETFUL = [name for name, text in TEXTS.items() if CONDITION.search(text)]


@pytest.fixture
def database(conninfo: str) -> Iterator[str]:
    """Return the connection string of a database with the project's tables, and with the role."""
    with new_database(conninfo) as database:
        migrate(database, ROLE)
        yield database


@pytest.fixture
def owner(database: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return a connection to it as the tables' owner, who sees everything."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def without_condition(name: str) -> Statement:
    """Return the statement of a file, changed to forget whose rows it is about."""
    return statements.parse(name, CONDITION.sub("TRUE", TEXTS[name]))


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every statement forget whose rows it is about."""
    changed = {f"tasks/{name}": without_condition(name) for name in FORGETFUL}
    everything = {"tasks/everything": statements.parse("everything", "SELECT user_id, title FROM tasks")}
    monkeypatch.setattr(statements, "load", lambda: LOADED | changed | everything)


def opened(conninfo: str, *, role: str = ROLE, share: int | None = None, pooler: bool = False) -> Database:
    """Return a database whose statements run as a role."""
    return Database(lambda: conninfo, get_share=lambda: share, pooler=pooler, role=role)


def create(database: Database, user_id: str, key: str | None = None) -> dict[str, Any]:
    """Create a task whose title is the name of its user, and return it."""
    parameters = {"user_id": user_id, "task": json.dumps({"title": user_id})}
    created = (
        database.fetch_json("tasks/create", **parameters)
        if key is None
        else database.fetch_json("tasks/create_once", idempotency_key=key, **parameters)
    )
    assert created
    task: dict[str, Any] = json.loads(created)
    return task


def list_tasks(database: Database, user_id: str) -> list[dict[str, Any]]:
    """Return all tasks that a user sees."""
    arrays, _ = database.fetch_json_list(
        "tasks/list", user_id=user_id, limit=10_000, completed="", q="", after=FIRST_CURSOR
    )
    return [task for array in arrays for task in json.loads(array)]


Call = Callable[[Database, int], object]  # as Bob, with the id of a task of Alice
CALLS: dict[str, Call] = {
    "create_once": lambda database, _: create(database, "bob", "key"),
    "delete": lambda database, task_id: database.fetch_json(
        "tasks/delete", user_id="bob", task_id=task_id, if_match="{}"
    ),
    "get": lambda database, task_id: database.fetch_json("tasks/get", user_id="bob", task_id=task_id),
    "list": lambda database, _: [task for task in list_tasks(database, "bob") if task["user_id"] != "bob"],
    "toggle": lambda database, task_id: database.fetch_json(
        "tasks/toggle", user_id="bob", task_id=task_id, if_match="{}"
    ),
    "update": lambda database, task_id: database.fetch_json(
        "tasks/update", user_id="bob", task_id=task_id, if_match="{}", changes='{"title": "bob"}'
    ),
}


def rows_of(user_id: str, owner: psycopg.Connection[TupleRow]) -> list[TupleRow]:
    """Return all rows of a user."""
    return [
        *owner.execute("SELECT * FROM tasks WHERE user_id = %s ORDER BY id", [user_id]),
        *owner.execute("SELECT * FROM idempotency_keys WHERE user_id = %s ORDER BY key", [user_id]),
    ]


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("name", FORGETFUL)
def test_a_statement_that_forgets_the_user_shows_and_changes_nobody_elses_rows(
    name: str, database: str, owner: psycopg.Connection[TupleRow]
) -> None:
    ours = opened(database)
    task_id = create(ours, "alice", "key")["id"]
    create(ours, "alice", "old key")
    create(ours, "bob")
    owner.execute("UPDATE idempotency_keys SET created_at = now() - interval '25 hours' WHERE key = 'old key'")
    before = rows_of("alice", owner)
    seen = CALLS[name](ours, task_id)
    assert rows_of("alice", owner) == before
    assert "alice" not in str(seen)
    assert name == "create_once" or not seen
    # Without the role, the same call does show or change Alice's rows: this test would notice it.
    leaked = CALLS[name](opened(database, role=""), task_id)
    assert "alice" in str(leaked) or rows_of("alice", owner) != before


def test_a_statement_cannot_store_a_row_for_somebody_else(
    database: str, owner: psycopg.Connection[TupleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXTS["create"].replace(":'user_id'::text", "'alice'")
    monkeypatch.setattr(statements, "load", lambda: LOADED | {"tasks/create": statements.parse("create", text)})
    with pytest.raises(UnavailableError, match="row-level security"):
        create(opened(database), "bob")
    assert rows_of("alice", owner) == []
    assert create(opened(database, role=""), "bob")["user_id"] == "alice"


@pytest.mark.usefixtures("forgetful")
def test_without_a_user_there_are_no_rows(database: str) -> None:
    ours = opened(database)
    create(ours, "alice")
    assert ours.fetch_json_list("tasks/everything", user_id="alice")[1] == 1
    assert ours.fetch_json_list("tasks/everything") == ([], 0)
    assert list_tasks(ours, "") == []
    with psycopg.connect(database, options=f"-c role={ROLE}") as db:  # its setting was never set
        assert db.execute("SELECT * FROM tasks").fetchall() == []


CUT = """
    SELECT CASE WHEN random() < 0.3 THEN pg_terminate_backend(pid) ELSE pg_cancel_backend(pid) END
    FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'todo_api'
"""


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("pooler", [False, True], ids=["direct", "PgBouncer"])
def test_32_threads_of_two_users_see_only_their_own_rows_while_connections_are_cut(
    pooler: bool, database: str, owner: psycopg.Connection[TupleRow]
) -> None:
    assert not pooler or pgbouncer.PROGRAM or program("pgbouncer")
    deadline = time.monotonic() + 4
    done: list[str] = []

    def use(database: Database, user_id: str) -> None:
        while time.monotonic() < deadline:
            with suppress(UnavailableError):
                task = create(database, user_id, uuid.uuid4().hex if random.random() < 0.5 else None)
                seen = [task, *list_tasks(database, user_id)]
                if toggled := database.fetch_json("tasks/toggle", user_id=user_id, task_id=task["id"], if_match="{}"):
                    seen.append(json.loads(toggled))
                assert {task["user_id"] for task in seen} == {user_id}
                done.append(user_id)

    def cut() -> None:
        while time.monotonic() < deadline:
            owner.execute(CUT)
            time.sleep(random.uniform(0, 0.2))

    with (
        pgbouncer.running(database, default_pool_size=1, server_login_retry=0.1) if pooler else nullcontext() as bouncer
    ):
        conninfo = bouncer.in_front_of(database) if bouncer else database
        ours = opened(conninfo, share=4, pooler=pooler)
        with ThreadPoolExecutor(33) as threads:
            users = [threads.submit(use, ours, ["alice", "bob"][number % 2]) for number in range(32)]
            threads.submit(cut).result()
            for user in users:
                user.result()
        assert set(done) == {"alice", "bob"}
        assert owner.execute("SELECT count(*) FROM tasks WHERE title <> user_id").fetchone() == (0,)
        with psycopg.connect(conninfo, autocommit=True, prepare_threshold=None) as other:
            identity = "SELECT current_user = session_user, coalesce(current_setting('todo.user_id', TRUE), '')"
            assert other.execute(identity).fetchone() == (True, "")


FAIL_AT_COMMIT = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN IF new.title = ''fail'' THEN RAISE EXCEPTION USING ERRCODE = ''57P99''; END IF; RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON tasks DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION fail()
"""


@pytest.mark.parametrize("pooler", [False, True], ids=["prepared", "not prepared"])
def test_a_failed_commit_is_no_success_and_leaves_a_connection_without_identity(
    database: str, owner: psycopg.Connection[TupleRow], pooler: bool
) -> None:
    owner.execute(FAIL_AT_COMMIT)
    ours = opened(database, pooler=pooler)
    task = create(ours, "alice")
    for user in ("fail", "bob", "fail"):  # the row arrives before the commit
        with suppress(UnavailableError):
            assert create(ours, user)["user_id"] == "bob"
    assert [list_tasks(ours, user) for user in ("alice", "fail")] == [[task], []]
    assert len(list_tasks(ours, "bob")) == 1
    current: tuple[bytes, list[bytes]] = (
        b"SELECT current_user = session_user, coalesce(current_setting('todo.user_id', TRUE), '')",
        [],
    )
    assert ours.pool.fetch(current) == (b"t", b"")


GUARDED = """
    SELECT
        tables.relname,
        tables.relrowsecurity,
        array_agg(policies.polcmd::text || ' ' || pg_get_expr(policies.polqual, policies.polrelid)),
        bool_and(policies.polwithcheck IS NULL AND policies.polroles = '{0}'),
        (SELECT array_agg(DISTINCT privilege_type::text ORDER BY privilege_type::text)
         FROM aclexplode(tables.relacl) WHERE grantee = 'todo_app'::regrole)
    FROM pg_class AS tables
    JOIN pg_attribute AS columns ON columns.attrelid = tables.oid AND columns.attname = 'user_id'
    LEFT JOIN pg_policy AS policies ON policies.polrelid = tables.oid
    WHERE tables.relkind IN ('r', 'p') AND NOT tables.relispartition
    GROUP BY tables.oid
    ORDER BY tables.relname
"""
POLICY = "* (user_id = current_setting('todo.user_id'::text, true))"


def test_every_table_with_a_user_is_guarded(owner: psycopg.Connection[TupleRow]) -> None:
    found = {table: guards for table, *guards in owner.execute(GUARDED)}
    assert found.keys() >= {"idempotency_keys", "tasks"}
    rights = ["DELETE", "INSERT", "SELECT", "UPDATE"]
    assert found == {table: [True, [POLICY], True, rights] for table in found}


def test_the_role_owns_nothing_and_has_no_other_rights(owner: psycopg.Connection[TupleRow]) -> None:
    attributes = """
        SELECT rolsuper, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls FROM pg_roles
        WHERE rolname = 'todo_app'
    """
    assert owner.execute(attributes).fetchone() == (False,) * 6
    owned = "SELECT relname FROM pg_class WHERE relowner = 'todo_app'::regrole"
    assert owner.execute(owned).fetchall() == []
    granted = """
        SELECT relname FROM pg_class, aclexplode(relacl) WHERE grantee = 'todo_app'::regrole GROUP BY relname
        ORDER BY relname
    """
    assert [name for (name,) in owner.execute(granted)] == ["idempotency_keys", "tasks", "tasks_id_seq"]


# ---- two users of the API


@pytest.fixture
def users(database: str, start: Start) -> tuple[httpx.Client, httpx.Client]:
    """Return the clients of two services on one database, whose users are Alice and Bob."""
    services: list[Service] = [start(DATABASE_URL=as_url(database), USER_ID=user) for user in ("alice", "bob")]
    alice, bob = (service.wait().client for service in services)
    return alice, bob


def test_somebody_elses_task_gets_the_404_of_a_missing_one_whatever_if_match_says(
    users: tuple[httpx.Client, httpx.Client],
) -> None:
    alice, bob = users
    task = alice.post("/api/tasks", json={"title": "alice"}).json()
    path, missing = f"/api/tasks/{task['id']}", f"/api/tasks/{task['id'] + 1000}"
    for if_match in (None, "*", '"1"', '"2"', '"1", "2"', 'W/"1"', '"x"'):
        headers = {"If-Match": if_match} if if_match else {}
        for method, suffix, body in (
            ("GET", "", None),
            ("PATCH", "", {}),
            ("DELETE", "", None),
            ("POST", "/toggle", None),
        ):
            theirs, none = (bob.request(method, url + suffix, headers=headers, json=body) for url in (path, missing))
            assert assert_problem(theirs, 404, "not_found") | {"instance": ""} == none.json() | {"instance": ""}
            assert theirs.headers.keys() == none.headers.keys()
    assert alice.get(path).json() == task
    assert bob.get("/api/tasks").json() == []


def test_the_same_idempotency_key_of_two_users_makes_two_tasks(users: tuple[httpx.Client, httpx.Client]) -> None:
    created = [
        user.post("/api/tasks", json={"title": "Buy milk"}, headers={"Idempotency-Key": "key"}) for user in users * 2
    ]
    assert [response.status_code for response in created] == [201] * 4
    tasks = [response.json() for response in created]
    assert [task["user_id"] for task in tasks] == ["alice", "bob"] * 2
    assert tasks[0]["id"] != tasks[1]["id"]
    assert tasks[2:] == tasks[:2]
    assert [user.get("/api/tasks").json() for user in users] == [[tasks[0]], [tasks[1]]]
