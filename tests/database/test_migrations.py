"""Migrations: concurrent starts, killed starts, and databases that do not match the code."""

import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psycopg
import pytest
import yoyo
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from tests.support.databases import administrator, as_url, new_database, yoyo_url
from tests.support.environment import ROOT, environment
from tests.support.processes import wait_until
from todo_api.config import StartError
from todo_api.database import UnavailableError, migrations, statements

FIRST_MIGRATION = "0001.create-tasks"
ALL_MIGRATIONS = sorted(path.stem for path in statements.MIGRATIONS.glob("[0-9]*[!k].sql"))
APPLY_SCRIPT = "import sys; from todo_api.database import migrations; sys.exit(str(migrations.apply(sys.argv[1])))"
# Starting a new interpreter for each killed process would take most of the tests' time.
_fork = multiprocessing.get_context("fork")


@pytest.fixture
def database(conninfo: str) -> Iterator[str]:
    """Return the connection string of an empty database."""
    with new_database(conninfo) as database:
        yield database


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the migrations folder, which a test may change."""
    return Path(shutil.copytree(statements.MIGRATIONS, tmp_path / "migrations"))


def query(database: str, sql: str) -> list[TupleRow]:
    """Run a statement and return its rows, if it returns any."""
    with psycopg.connect(database, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def applied_migrations(database: str) -> list[str]:
    """Return the names of the applied migrations in yoyo's log, repeated if they are logged repeatedly."""
    return [
        name
        for (name,) in query(
            database,
            "SELECT migration_id FROM _yoyo_migration JOIN _yoyo_log USING (migration_id) ORDER BY migration_id",
        )
    ]


def table_names(database: str) -> set[str]:
    """Return the names of all tables, without PostgreSQL's own."""
    return {name for (name,) in query(database, "SELECT relname FROM pg_class WHERE relkind = 'r' AND oid >= 16384")}


def start_migrating(database: str, folder: Path = statements.MIGRATIONS) -> BaseProcess:
    """Start and return a process that applies the migrations."""
    process = _fork.Process(target=migrations.apply, args=(database, folder))
    process.start()
    return process


def error_message(database: str, folder: Path = statements.MIGRATIONS) -> str:
    """Return the message with which the migrations fail; it must be one line."""
    with pytest.raises(StartError) as failed:
        migrations.apply(database, folder)
    assert "\n" not in str(failed.value)
    return str(failed.value)


def test_a_new_database_is_migrated_once(database: str) -> None:
    assert migrations.apply(database) == ALL_MIGRATIONS
    assert migrations.apply(database) == []
    assert query(database, "SELECT * FROM tasks") == []
    assert applied_migrations(database) == ALL_MIGRATIONS


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_the_environments_client_encoding_does_not_matter(
    encoding: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", encoding)
    assert migrations.apply(database) == ALL_MIGRATIONS
    assert migrations.apply(database) == []


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_concurrent_starts_apply_each_migration_once(database: str, level: str) -> None:
    query(
        database, f"ALTER DATABASE {conninfo_to_dict(database)['dbname']} SET default_transaction_isolation = '{level}'"
    )
    processes = [start_migrating(database) for _ in range(8)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert applied_migrations(database) == ALL_MIGRATIONS


def test_a_start_needs_only_one_connection(conninfo: str, database: str) -> None:
    # If each start needed two, concurrent starts could take all connections of a pooler and wait for one another.
    # The limit is set from another database: a connection to this one might still count when the start connects.
    query(conninfo, f"ALTER DATABASE {conninfo_to_dict(database)['dbname']} CONNECTION LIMIT 1")
    assert migrations.apply(database) == ALL_MIGRATIONS


@pytest.mark.parametrize("attempt", range(10))
def test_a_start_killed_at_any_moment_needs_no_repair(database: str, attempt: int) -> None:
    process = start_migrating(database)
    time.sleep(attempt * 0.008 + random.uniform(0, 0.008))
    process.kill()
    process.join()
    assert migrations.apply(database) in (ALL_MIGRATIONS, [])
    assert applied_migrations(database) == ALL_MIGRATIONS
    assert query(database, "SELECT * FROM tasks") == []


GATE = "LOCK TABLE gate;"
AT_COMMIT = f"""
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {GATE} RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON one DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION wait();
INSERT INTO one DEFAULT VALUES;
"""


@pytest.mark.parametrize(
    "second_migration",
    [
        f"{GATE} CREATE TABLE two ();",
        f"CREATE TABLE two (); {GATE} CREATE TABLE three ();",
        f"CREATE TABLE two (); {GATE}",
        f"CREATE TABLE two (); {AT_COMMIT}",
    ],
    ids=["before its first statement", "between its statements", "before it is marked as applied", "during its commit"],
)
def test_a_start_killed_during_a_migration_needs_no_repair(
    database: str, tmp_path: Path, second_migration: str
) -> None:
    query(database, "CREATE TABLE gate ()")
    (tmp_path / "0001.one.sql").write_text("CREATE TABLE one ();", encoding="utf-8")
    (tmp_path / "0002.two.sql").write_text(second_migration, encoding="utf-8")
    with psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE gate")
        process = start_migrating(database, tmp_path)
        wait_until(lambda: bool(query(database, "SELECT * FROM pg_locks WHERE NOT granted AND locktype = 'relation'")))
        process.kill()
        process.join()
        assert table_names(database) == {"gate"}
    # PostgreSQL completes a commit that it has received, even if the client was killed.
    assert migrations.apply(database, tmp_path) == (
        [] if second_migration.endswith(AT_COMMIT) else ["0001.one", "0002.two"]
    )
    assert applied_migrations(database) == ["0001.one", "0002.two"]
    assert {"one", "two"} <= table_names(database)


@pytest.fixture
def older(database: str, tmp_path: Path) -> str:
    """Return the connection string of a database with tasks, as the previous version has left it."""
    folder = Path(shutil.copytree(statements.MIGRATIONS, tmp_path / "older"))
    for path in [*folder.glob("0004*"), *folder.glob("0005*")]:
        path.unlink()
    assert migrations.apply(database, folder) == ALL_MIGRATIONS[:3]
    query(database, FILL)
    return database


FILL = """
    INSERT INTO tasks (user_id, title, completed)
    SELECT 'user ' || n % 7, n, n % 2 = 0 FROM generate_series(1, 50000) AS n
"""
INDEXES = """
    SELECT indexes.indexdef FROM pg_indexes AS indexes
    WHERE indexes.tablename IN ('tasks', 'idempotency_keys') AND (SELECT bool_and(indisvalid) FROM pg_index)
    ORDER BY indexes.indexname
"""


@pytest.mark.parametrize("attempt", range(6))
def test_a_start_killed_while_it_indexes_many_tasks_needs_no_repair(older: str, attempt: int, conninfo: str) -> None:
    process = start_migrating(older)
    time.sleep(attempt * 0.05 + random.uniform(0, 0.05))
    process.kill()
    process.join()
    assert migrations.apply(older) in (ALL_MIGRATIONS[3:], [])
    assert applied_migrations(older) == ALL_MIGRATIONS
    assert query(older, "SELECT count(*), sum(version) FROM tasks") == [(50_000, 50_000)]
    with new_database(conninfo) as new:
        migrations.apply(new)
        assert query(older, INDEXES) == query(new, INDEXES) != []


BUILD = re.findall("-c '(CREATE [^']* CONCURRENTLY [^']*)'", (statements.SQL / "README.md").read_text(encoding="utf-8"))


def test_indexes_that_were_built_before_are_used(older: str) -> None:
    for command in BUILD:
        query(older, command)
    built = query(older, "SELECT oid FROM pg_class WHERE relname IN ('tasks_by_user', 'tasks_open_newest_first')")
    assert len(built) == 2
    assert migrations.apply(older) == ALL_MIGRATIONS[3:]
    names = "SELECT oid FROM pg_class WHERE relname IN ('tasks_pkey', 'tasks_open_newest_first')"
    assert set(query(older, names)) == set(built)


def test_an_index_whose_build_was_interrupted_is_named(older: str) -> None:
    for command in BUILD:
        query(older, command)
    with psycopg.connect(administrator(older)) as admin:
        admin.execute("UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'tasks_open_newest_first'::regclass")
    assert error_message(older) == (
        "migration 0005.index-tasks-by-user failed: the build of the index tasks_open_newest_first was interrupted: "
        "drop the index"
    )
    assert applied_migrations(older) == ALL_MIGRATIONS[:3]
    query(older, "DROP INDEX tasks_open_newest_first")
    assert migrations.apply(older) == ALL_MIGRATIONS[3:]


def test_a_stale_row_in_yoyos_lock_table_delays_no_start(database: str) -> None:
    query(database, "CREATE TABLE yoyo_lock (locked int PRIMARY KEY, ctime timestamp, pid int NOT NULL)")
    query(database, "INSERT INTO yoyo_lock VALUES (1, now(), 1)")
    started = time.monotonic()
    assert migrations.apply(database) == ALL_MIGRATIONS
    assert time.monotonic() - started < 5, "the start waited for yoyo's lock, up to 10 s"


def test_a_folder_without_migrations_is_rejected(database: str, tmp_path: Path) -> None:
    assert error_message(database, tmp_path) == f"there are no migrations in {tmp_path}"
    assert error_message(database, tmp_path / "missing") == f"there are no migrations in {tmp_path / 'missing'}"
    assert table_names(database) == set()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"SELECT '\xff';", "can't decode byte 0xff"),
        (b"-- depends: 0000.missing\nSELECT 1;", "Could not resolve dependencies"),
        (b"-- depends: 9998.wrong\nSELECT 1;", "loop detected"),
        (b"-- transactional: perhaps\nSELECT 1;", "perhaps"),
        (b"-- transactional: false\nSELECT 1;", "9998.wrong is not transactional"),
    ],
)
def test_a_migration_that_yoyo_cannot_run_safely_is_rejected(
    database: str, folder: Path, text: bytes, reason: str
) -> None:
    (folder / "9998.wrong.sql").write_bytes(text)
    assert reason in error_message(database, folder)
    assert table_names(database) == set()


def test_an_applied_migration_that_was_edited_is_rejected(database: str, folder: Path) -> None:
    migrations.apply(database, folder)
    with (folder / f"{FIRST_MIGRATION}.sql").open("a", encoding="utf-8") as file:
        file.write("\nCREATE TABLE more ();\n")
    assert error_message(database, folder).startswith(
        f"sql/migrations/{FIRST_MIGRATION}.sql was edited after it was applied; "
    )
    assert "more" not in table_names(database)


def test_a_change_of_line_endings_is_not_an_edit(database: str, folder: Path) -> None:
    migrations.apply(database, folder)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert migrations.apply(database, folder) == []


def test_migrations_with_windows_line_endings_are_applied(database: str, folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert migrations.apply(database, folder) == ALL_MIGRATIONS
    assert migrations.apply(database) == []


def test_a_database_that_is_ahead_of_the_code_is_rejected(database: str, folder: Path) -> None:
    (folder / "9999.later.sql").write_text("CREATE TABLE later ();", encoding="utf-8")
    migrations.apply(database, folder)
    assert error_message(database).startswith("the database is ahead of this code: it has migration 9999.later, ")


@pytest.mark.parametrize("has_tables", [True, False], ids=["later start", "first start"])
def test_a_failed_migration_rolls_back_all_migrations_of_its_start(
    database: str, folder: Path, has_tables: bool
) -> None:
    if has_tables:
        migrations.apply(database, folder)
    tables_before = table_names(database)
    (folder / "9998.good.sql").write_text("CREATE TABLE good ();", encoding="utf-8")
    (folder / "9999.wrong.sql").write_text("CREATE TABLE half ();\n\nSELECT 1 / 0;", encoding="utf-8")
    assert error_message(database, folder) == "migration 9999.wrong failed: division by zero"
    assert table_names(database) == tables_before
    (folder / "9999.wrong.sql").write_text("CREATE TABLE whole ();", encoding="utf-8")
    assert migrations.apply(database, folder)[-2:] == ["9998.good", "9999.wrong"]


def test_the_error_names_a_table_that_already_exists(database: str) -> None:
    query(database, "CREATE TABLE tasks ()")
    assert error_message(database) == f'migration {FIRST_MIGRATION} failed: relation "tasks" already exists'
    assert table_names(database) == {"tasks"}


def test_an_unreachable_database_raises_unavailable_error(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        migrations.apply(f"host={tmp_path} dbname=todo")


def test_yoyo_rolls_back_all_migrations_and_they_can_be_applied_again(database: str) -> None:
    own_types_query = "SELECT typname FROM pg_type WHERE oid >= 16384 AND typname !~ 'yoyo'"  # tables are types too
    migrations.apply(database)
    assert query(database, own_types_query)
    with yoyo.get_backend(yoyo_url(database)) as backend:
        found = yoyo.read_migrations(str(statements.MIGRATIONS))
        backend.rollback_migrations(backend.to_rollback(found))
    assert query(database, own_types_query) == []
    assert migrations.apply(database) == ALL_MIGRATIONS
    assert query(database, "SELECT * FROM tasks") == []


def test_a_user_id_without_a_passwd_entry_can_migrate(database: str) -> None:
    # yoyo calls getpass.getuser(), which raises an error for such a user.
    environ = environment()
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        environ.pop(name, None)
    check_script = "import getpass, pwd\ntry: print(getpass.getuser())\nexcept KeyError: pass\n"
    command = [sys.executable, "-c", check_script + APPLY_SCRIPT, database]
    if os.geteuid() == 0:
        # The capability lets the process open the embedded server's socket, which is closed to other users.
        user = ["--reuid=12345", "--regid=12345", "--clear-groups"]
        command = ["setpriv", *user, "--inh-caps=+dac_override", "--ambient-caps=+dac_override", *command]
    else:
        # Only root can change its user id. Any other user keeps its id, but finds an empty passwd file.
        command[2] = f"import pwd; pwd.getpwuid = {{}}.__getitem__\n{command[2]}"
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr.strip()) == ("", str(ALL_MIGRATIONS))


@pytest.mark.parametrize("name", ["a[x]b", "a*b?", "a b%20c+d", "package:a:b"])
def test_the_path_of_the_folder_may_contain_any_character(database: str, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(statements.MIGRATIONS, tmp_path / name / "migrations"))
    assert migrations.apply(database, folder) == ALL_MIGRATIONS


def test_a_select_in_a_migration_prints_nothing(database: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "9999.select.sql").write_text("SELECT 'noise' AS noise;", encoding="utf-8")
    assert migrations.apply(database, folder) == [*ALL_MIGRATIONS, "9999.select"]
    assert capfd.readouterr().out == ""


def test_flask_migrate_reports_an_error_in_one_line(database: str, folder: Path) -> None:
    (folder / "9999.later.sql").write_text("CREATE TABLE later ();", encoding="utf-8")
    migrations.apply(database, folder)
    result = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wsgi", "migrate"],
        cwd=ROOT,
        env=environment(DATABASE_URL=as_url(database)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode != 0, result.stdout) == (True, "")
    assert re.fullmatch("todo_api: the database is ahead of this code: .*\n", result.stderr)
