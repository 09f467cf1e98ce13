"""The start makes the role that statements run as, or says in one line what an administrator has to run."""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from tests.support.databases import as_url, new_database
from tests.support.fixtures import Start
from todo_api.config import StartError
from todo_api.database import Database, UnavailableError, apply_migrations, ensure_role, make_role

ODD_ROLE = 'a "role"; with % and \\ in its näme'


@pytest.fixture
def admin(conninfo: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return a connection of an administrator of the tests' server."""
    superuser = conninfo if os.environ.get("TEST_DATABASE_URL") else make_conninfo(conninfo, user="postgres")
    with psycopg.connect(superuser, autocommit=True) as connection:
        yield connection


NewRole = Callable[..., str]


@pytest.fixture
def new_role(admin: psycopg.Connection[TupleRow]) -> Iterator[NewRole]:
    """Return a function that creates a role with a new name and returns the name. Drop the roles after the test."""
    names: list[str] = []

    def create(attributes: str = "", *, exists: bool = True, name: str = "role") -> str:
        names.append(f"{name} {uuid.uuid4().hex[:8]}")
        if exists:
            admin.execute(sql.SQL("CREATE ROLE {} ").format(sql.Identifier(names[-1])) + sql.SQL(attributes))
        return names[-1]

    yield create
    for name in names:
        if admin.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).fetchone():
            admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
    for name in reversed(names):
        admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))


Login = Callable[[str], str]


@pytest.fixture
def login(admin: psycopg.Connection[TupleRow], conninfo: str, new_role: NewRole) -> Iterator[Login]:
    """Return a function that creates a login role with an empty database, and returns its connection string."""
    with ExitStack() as databases:

        def create(attributes: str) -> str:
            name, password = new_role(f"LOGIN PASSWORD 'secret' {attributes}"), "secret"
            database = databases.enter_context(new_database(conninfo))
            with psycopg.connect(database) as connection:
                admin.execute(
                    sql.SQL("ALTER DATABASE {} OWNER TO {}").format(
                        sql.Identifier(connection.info.dbname), sql.Identifier(name)
                    )
                )
            return make_conninfo(database, user=name, password=password)

        yield create


def ensure(conninfo: str, role: str, owner: str | None = None) -> None:
    """Migrate a database and ensure its role, as a start does."""
    make_role(conninfo, role, pooler=False, owner=owner or conninfo)
    apply_migrations(owner or conninfo)
    ensure_role(conninfo, role, pooler=False, owner=owner or conninfo)


def can_be_used(conninfo: str, role: str) -> bool:
    """Return whether the service can create and change a task with a role."""
    database = Database(lambda: conninfo, pooler=False, role=role)
    parameters = {"user_id": "local", "task": '{"title": "Buy milk"}'}
    assert database.fetch_json("tasks/create", **parameters)
    assert database.fetch_json("tasks/create_once", **parameters, idempotency_key="key")
    return bool(database.fetch_json("tasks/toggle", user_id="local", task_id=1, if_match="{}"))


def commands_in(message: str) -> str:
    """Return the commands that the message of a failed start tells an administrator to run."""
    assert "\n" not in message
    found = re.search(r"let an administrator run in this database: (.*); or set DATABASE_ROLE", message)
    assert found, message
    return found[1]


def run(conninfo: str, admin: psycopg.Connection[TupleRow], commands: str) -> None:
    """Run commands in a database as an administrator, with psql's protocol."""
    superuser = {"user": admin.info.user, "password": admin.info.password or None}
    with psycopg.connect(make_conninfo(conninfo, **superuser), autocommit=True) as connection:
        connection.execute(commands.encode())


@pytest.mark.parametrize("name", ["todo_app", ODD_ROLE])
def test_a_login_that_may_create_roles_makes_the_role_itself(login: Login, new_role: NewRole, name: str) -> None:
    conninfo, role = login("CREATEROLE"), new_role(exists=False, name=name)
    for _ in range(2):
        ensure(conninfo, role)
        assert can_be_used(conninfo, role)


def test_a_login_that_may_not_create_roles_gets_one_line_with_the_commands_that_help(
    login: Login, new_role: NewRole, admin: psycopg.Connection[TupleRow]
) -> None:
    conninfo, role = login(""), new_role(exists=False, name=ODD_ROLE)
    with pytest.raises(StartError, match="permission denied to create role") as refused:
        ensure(conninfo, role)
    assert commands_in(str(refused.value)).startswith("CREATE ROLE ")
    run(conninfo, admin, commands_in(str(refused.value)))
    ensure(conninfo, role)
    assert can_be_used(conninfo, role)


def test_a_role_of_somebody_else_must_be_granted_by_an_administrator(
    login: Login, new_role: NewRole, admin: psycopg.Connection[TupleRow]
) -> None:
    conninfo, role = login(""), new_role()
    with pytest.raises(StartError) as refused:
        ensure(conninfo, role)
    assert commands_in(str(refused.value)).startswith(f'GRANT "{role}" TO ')
    run(conninfo, admin, commands_in(str(refused.value)))
    ensure(conninfo, role)
    assert can_be_used(conninfo, role)


def test_rights_that_were_lost_are_granted_again(login: Login, new_role: NewRole) -> None:
    conninfo, role = login("CREATEROLE"), new_role(exists=False)
    ensure(conninfo, role)
    with psycopg.connect(conninfo) as connection:
        for what in ("SELECT ON tasks", "USAGE ON SEQUENCE tasks_id_seq", "ALL ON idempotency_keys"):
            connection.execute(sql.SQL("REVOKE {} FROM {}").format(sql.SQL(what), sql.Identifier(role)))
    ensure(conninfo, role)
    assert can_be_used(conninfo, role)


def test_statements_fail_while_the_role_is_gone_and_work_again_once_it_is_back(login: Login, new_role: NewRole) -> None:
    conninfo, role = login("SUPERUSER"), new_role(exists=False)
    ensure(conninfo, role)
    database = Database(lambda: conninfo, pooler=False, role=role)
    assert database.fetch_json("database/ready")
    with psycopg.connect(conninfo) as connection:
        connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))
    with pytest.raises(UnavailableError, match="does not exist"):
        database.fetch_json("database/ready")
    ensure(conninfo, role)
    assert database.fetch_json("database/ready")


def test_a_start_that_may_not_make_the_role_changes_nothing(login: Login, new_role: NewRole) -> None:
    conninfo = login("")
    with pytest.raises(StartError, match="let an administrator run in this database: CREATE ROLE"):
        ensure(conninfo, new_role(exists=False))
    with psycopg.connect(conninfo) as db:
        assert db.execute("SELECT to_regclass('tasks')").fetchone() == (None,)


@pytest.mark.parametrize("attributes", ["SUPERUSER", "BYPASSRLS"])
def test_a_role_that_bypasses_row_level_security_is_refused(
    login: Login, new_role: NewRole, admin: psycopg.Connection[TupleRow], attributes: str
) -> None:
    role = new_role(attributes)
    for conninfo in (login(""), login("SUPERUSER")):
        with pytest.raises(StartError, match="set DATABASE_ROLE to the name of a new role") as refused:
            ensure(conninfo, role)
        assert "\n" not in str(refused.value)
    members = admin.execute("SELECT count(*) FROM pg_auth_members WHERE roleid = %s::text::regrole", [f'"{role}"'])
    assert members.fetchone() == (0,)  # nobody can work as it now


def test_the_owner_is_refused_as_the_role(login: Login) -> None:
    conninfo = login("")
    with pytest.raises(StartError, match="row-level security does not hold for the role"):
        ensure(conninfo, str(conninfo_to_dict(conninfo)["user"]))


def test_a_login_that_does_not_own_the_tables_can_be_the_role_itself(
    login: Login, new_role: NewRole, admin: psycopg.Connection[TupleRow]
) -> None:
    owner = login("CREATEROLE")
    name = new_role("LOGIN PASSWORD 'secret'")
    conninfo = make_conninfo(owner, user=name)
    ensure(conninfo, name, owner)
    assert can_be_used(conninfo, name)
    with pytest.raises(StartError, match="hides every row") as refused:
        ensure(conninfo, "", owner)
    assert "\n" not in str(refused.value)
    ensure(owner, "")
    assert can_be_used(owner, "")


def test_concurrent_starts_on_two_databases_of_a_server_make_one_role(login: Login, new_role: NewRole) -> None:
    databases, role = [login("SUPERUSER"), login("SUPERUSER")], new_role(exists=False)
    for database in databases:
        apply_migrations(database)
    with ThreadPoolExecutor(16) as threads:
        starts = [threads.submit(ensure, databases[number % 2], role) for number in range(16)]
        for start in starts:
            start.result()
    assert all(can_be_used(database, role) for database in databases)


def test_the_service_starts_with_the_role_or_without_one_or_ends_with_one_line(
    login: Login, new_role: NewRole, start: Start
) -> None:
    database, role = as_url(login("")), new_role(exists=False)
    refused = start(DATABASE_URL=database, DATABASE_ROLE=role)
    assert refused.process.wait(timeout=60) != 0
    last_line = refused.log().splitlines()[-1]
    assert re.fullmatch(f'todo_api: row-level security needs .*: CREATE ROLE "{role}" NOLOGIN; .*', last_line)
    assert "Traceback" not in refused.log()
    service = start(DATABASE_URL=database, DATABASE_ROLE="").wait()
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == 201
    assert service.stop() == 0
