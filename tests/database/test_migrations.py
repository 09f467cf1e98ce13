"""Migrations: many starts at once, starts that are killed, and databases that do not fit the code."""

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
from urllib.parse import urlencode

import psycopg
import pytest
import yoyo
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from tests.support.databases import as_url, new_database
from tests.support.environment import ROOT, environment
from tests.support.processes import wait_until
from todo_api.config import StartError
from todo_api.database import UnavailableError, migrations, statements

FIRST = "0001.create-tasks"
ALL = sorted(path.stem for path in statements.MIGRATIONS.glob("[0-9]*[!k].sql"))
APPLY = "import sys; from todo_api.database import migrations; sys.exit(str(migrations.apply(sys.argv[1])))"
# A new interpreter for each process that is killed would take most of the tests' time.
_fork = multiprocessing.get_context("fork")


@pytest.fixture
def database(conninfo: str) -> Iterator[str]:
    """Give the connection string of an empty database."""
    with new_database(conninfo) as database:
        yield database


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder with the migrations of the project, to be changed."""
    return Path(shutil.copytree(statements.MIGRATIONS, tmp_path / "migrations"))


def query(database: str, sql: str) -> list[TupleRow]:
    """Run a statement of the test's own and give its rows, where it has some."""
    with psycopg.connect(database, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def applied(database: str) -> list[str]:
    """Give the names of the migrations that are marked, each as often as it is in yoyo's log."""
    return [
        name
        for (name,) in query(
            database,
            "SELECT migration_id FROM _yoyo_migration JOIN _yoyo_log USING (migration_id) ORDER BY migration_id",
        )
    ]


def tables(database: str) -> set[str]:
    """Give the names of all tables."""
    return {name for (name,) in query(database, "SELECT relname FROM pg_class WHERE relkind = 'r' AND oid >= 16384")}


def migrating(database: str, folder: Path = statements.MIGRATIONS) -> BaseProcess:
    """Start a process that applies migrations."""
    process = _fork.Process(target=migrations.apply, args=(database, folder))
    process.start()
    return process


def refusal(database: str, folder: Path = statements.MIGRATIONS) -> str:
    """Give the message, one line, with which applying fails."""
    with pytest.raises(StartError) as failed:
        migrations.apply(database, folder)
    assert "\n" not in str(failed.value)
    return str(failed.value)


def test_a_fresh_database_gets_the_table_once(database: str) -> None:
    assert migrations.apply(database) == ALL
    assert migrations.apply(database) == []
    assert query(database, "SELECT * FROM tasks") == []
    assert applied(database) == ALL


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_eight_starts_at_once_apply_each_migration_once(database: str, level: str) -> None:
    query(
        database, f"ALTER DATABASE {conninfo_to_dict(database)['dbname']} SET default_transaction_isolation = '{level}'"
    )
    processes = [migrating(database) for _ in range(8)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert applied(database) == ALL


def test_a_start_needs_one_connection_only(conninfo: str, database: str) -> None:
    """With two, as many starts as a pooler has connections would wait for each other."""
    # From elsewhere: a connection of the test's own may not have ended yet when the start wants its one.
    query(conninfo, f"ALTER DATABASE {conninfo_to_dict(database)['dbname']} CONNECTION LIMIT 1")
    assert migrations.apply(database) == ALL


@pytest.mark.parametrize("attempt", range(10))
def test_a_start_killed_at_any_moment_needs_no_repair(database: str, attempt: int) -> None:
    process = migrating(database)
    time.sleep(attempt * 0.008 + random.uniform(0, 0.008))
    process.kill()
    process.join()
    assert migrations.apply(database) in (ALL, [])
    assert applied(database) == ALL
    assert query(database, "SELECT * FROM tasks") == []


GATE = "LOCK TABLE gate;"
AT_COMMIT = f"""
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {GATE} RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON one DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION wait();
INSERT INTO one DEFAULT VALUES;
"""


@pytest.mark.parametrize(
    "second",
    [
        f"{GATE} CREATE TABLE two ();",
        f"CREATE TABLE two (); {GATE} CREATE TABLE three ();",
        f"CREATE TABLE two (); {GATE}",
        f"CREATE TABLE two (); {AT_COMMIT}",
    ],
    ids=["before its first statement", "in its middle", "before it is marked", "in its commit"],
)
def test_a_start_killed_while_it_hangs_in_a_migration_needs_no_repair(
    database: str, tmp_path: Path, second: str
) -> None:
    query(database, "CREATE TABLE gate ()")
    (tmp_path / "0001.one.sql").write_text("CREATE TABLE one ();", encoding="utf-8")
    (tmp_path / "0002.two.sql").write_text(second, encoding="utf-8")
    with psycopg.connect(database) as blocker:
        blocker.execute("LOCK TABLE gate")
        process = migrating(database, tmp_path)
        wait_until(lambda: bool(query(database, "SELECT * FROM pg_locks WHERE NOT granted AND locktype = 'relation'")))
        process.kill()
        process.join()
        assert tables(database) == {"gate"}
    # A commit that was asked for is made, killed or not.
    assert migrations.apply(database, tmp_path) == ([] if second.endswith(AT_COMMIT) else ["0001.one", "0002.two"])
    assert applied(database) == ["0001.one", "0002.two"]
    assert {"one", "two"} <= tables(database)


def test_a_row_that_yoyo_left_in_its_lock_table_does_not_matter(database: str) -> None:
    query(database, "CREATE TABLE yoyo_lock (locked int PRIMARY KEY, ctime timestamp, pid int NOT NULL)")
    query(database, "INSERT INTO yoyo_lock VALUES (1, now(), 1)")
    started = time.monotonic()
    assert migrations.apply(database) == ALL
    assert time.monotonic() - started < 5, "yoyo waits 10 s for its lock"


def test_a_folder_without_migrations_is_refused(database: str, tmp_path: Path) -> None:
    assert refusal(database, tmp_path) == f"there are no migrations in {tmp_path}"
    assert refusal(database, tmp_path / "missing") == f"there are no migrations in {tmp_path / 'missing'}"
    assert tables(database) == set()


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
def test_a_migration_that_yoyo_cannot_run_safely_is_refused(
    database: str, folder: Path, text: bytes, reason: str
) -> None:
    (folder / "9998.wrong.sql").write_bytes(text)
    assert reason in refusal(database, folder)
    assert tables(database) == set()


def test_an_applied_migration_that_was_edited_is_refused(database: str, folder: Path) -> None:
    migrations.apply(database, folder)
    with (folder / f"{FIRST}.sql").open("a", encoding="utf-8") as file:
        file.write("\nCREATE TABLE more ();\n")
    assert refusal(database, folder).startswith(f"sql/migrations/{FIRST}.sql was edited after it was applied; ")
    assert "more" not in tables(database)


def test_line_ends_are_no_edit(database: str, folder: Path) -> None:
    migrations.apply(database, folder)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert migrations.apply(database, folder) == []


def test_a_folder_with_windows_line_ends_is_applied_like_any_other(database: str, folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert migrations.apply(database, folder) == ALL
    assert migrations.apply(database) == []


def test_a_database_that_is_ahead_of_the_code_is_refused(database: str, folder: Path) -> None:
    (folder / "9999.later.sql").write_text("CREATE TABLE later ();", encoding="utf-8")
    migrations.apply(database, folder)
    assert refusal(database).startswith("the database is ahead of this code: it has migration 9999.later, ")


@pytest.mark.parametrize("before", [True, False], ids=["first start", "later start"])
def test_a_migration_with_an_error_leaves_nothing_behind(database: str, folder: Path, before: bool) -> None:
    if before:
        migrations.apply(database, folder)
    there = tables(database)
    (folder / "9998.good.sql").write_text("CREATE TABLE good ();", encoding="utf-8")
    (folder / "9999.wrong.sql").write_text("CREATE TABLE half ();\n\nSELECT 1 / 0;", encoding="utf-8")
    assert refusal(database, folder) == "migration 9999.wrong failed: division by zero"
    assert tables(database) == there
    (folder / "9999.wrong.sql").write_text("CREATE TABLE whole ();", encoding="utf-8")
    assert migrations.apply(database, folder)[-2:] == ["9998.good", "9999.wrong"]


def test_a_table_that_is_already_there_is_named(database: str) -> None:
    query(database, "CREATE TABLE tasks ()")
    assert refusal(database) == f'migration {FIRST} failed: relation "tasks" already exists'
    assert tables(database) == {"tasks"}


def test_a_database_that_cannot_be_reached_is_no_start_error(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        migrations.apply(f"host={tmp_path} dbname=todo")


def test_yoyo_rolls_back_what_was_applied_and_it_can_be_applied_again(database: str) -> None:
    ours = "SELECT typname FROM pg_type WHERE oid >= 16384 AND typname !~ 'yoyo'"  # tables are types too
    migrations.apply(database)
    assert query(database, ours)
    with yoyo.get_backend(yoyo_url(database)) as backend:
        found = yoyo.read_migrations(str(statements.MIGRATIONS))
        backend.rollback_migrations(backend.to_rollback(found))
    assert query(database, ours) == []
    assert migrations.apply(database) == ALL
    assert query(database, "SELECT * FROM tasks") == []


def yoyo_url(database: str) -> str:
    """Give a connection string in the form that yoyo's own command line takes."""
    parts = {name: str(value) for name, value in conninfo_to_dict(database).items()}
    return f"postgresql+psycopg://{parts.pop('user')}@/{parts.pop('dbname')}?{urlencode(parts)}"


def test_a_user_id_without_a_passwd_entry_can_migrate(database: str) -> None:
    """getpass.getuser(), which yoyo asks, finds no name for it."""
    environ = environment()
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        environ.pop(name, None)
    nameless = "import getpass, pwd\ntry: print(getpass.getuser())\nexcept KeyError: pass\n"
    command = [sys.executable, "-c", nameless + APPLY, database]
    if os.geteuid() == 0:
        # The capability lets it through to the embedded server's socket, which is open to root alone.
        user = ["--reuid=12345", "--regid=12345", "--clear-groups"]
        command = ["setpriv", *user, "--inh-caps=+dac_override", "--ambient-caps=+dac_override", *command]
    else:
        # Only root can take another user id, so here the passwd file is taken away instead.
        command[2] = f"import pwd; pwd.getpwuid = {{}}.__getitem__\n{command[2]}"
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.strip()) == ("", str(ALL))


@pytest.mark.parametrize("name", ["a[x]b", "a*b?", "a b%20c+d", "package:a:b"])
def test_the_folders_path_may_hold_any_character(database: str, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(statements.MIGRATIONS, tmp_path / name / "migrations"))
    assert migrations.apply(database, folder) == ALL


def test_a_migration_that_selects_prints_nothing(
    database: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "9999.select.sql").write_text("SELECT 'noise' AS noise;", encoding="utf-8")
    assert migrations.apply(database, folder) == [*ALL, "9999.select"]
    assert capfd.readouterr().out == ""


def test_flask_migrate_says_in_one_line_what_is_wrong(database: str, folder: Path) -> None:
    (folder / "9999.later.sql").write_text("CREATE TABLE later ();", encoding="utf-8")
    migrations.apply(database, folder)
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wsgi", "migrate"],
        cwd=ROOT,
        env=environment(DATABASE_URL=as_url(database)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert re.fullmatch("todo_api: the database is ahead of this code: .*\n", done.stderr)
