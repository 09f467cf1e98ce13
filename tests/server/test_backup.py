"""``flask backup`` and ``flask restore``: all of it or nothing, whatever happens meanwhile."""

import os
import pty
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from tests.support import pgbouncer
from tests.support.commands import FLASK, flask, message, started
from tests.support.databases import administrator, as_url, new_database
from tests.support.embedded import BIN, permissions
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.optional_tools import program
from tests.support.processes import children, postmaster_in, servers_in, wait_until
from todo_api import backup as backups
from todo_api.config import Settings, StartError
from todo_api.database import apply_migrations, statements

SPECIAL = "tab\t\\. \\N \u2028 \r\n\\.\n\x01 'quote' \U0001f95b é"
MIGRATIONS = sorted(path.stem for path in statements.MIGRATIONS.glob("[0-9]*[!k].sql"))
SESSIONS = """
    SELECT 1 FROM pg_stat_activity WHERE application_name = 'todo_api' AND datname = current_database()
"""
PASSWORD = "h-u-s-h"
TABLES = ("tasks", "idempotency_keys")


@pytest.fixture
def empty(conninfo: str) -> Iterator[str]:
    """Return the connection string of a database without tables."""
    with new_database(conninfo) as database:
        yield database


@pytest.fixture
def database(conninfo: str) -> Iterator[str]:
    """Return the connection string of a database with three tasks and a key. A fourth task was deleted."""
    with new_database(conninfo) as database:
        apply_migrations(database)
        add_rows(database)
        yield database


def add_rows(database: str, tables: tuple[str, ...] = TABLES) -> None:
    """Add three tasks and a key, and delete a fourth task."""
    with psycopg.connect(database) as db:
        for title in ("Buy milk", SPECIAL, "Call", "to be deleted"):
            values = ["alice", title, None if title == "Call" else title]
            db.execute("INSERT INTO tasks (user_id, title, description) VALUES (%s, %s, %s)", values)
        db.execute("UPDATE tasks SET completed = TRUE, version = 7, updated_at = now() + interval '1 s' WHERE id = 2")
        db.execute("DELETE FROM tasks WHERE id = 4")
        if "idempotency_keys" in tables:
            db.execute("INSERT INTO idempotency_keys (user_id, key, task, task_id) VALUES ('alice', '\\', '{}', 4)")


@pytest.fixture
def backup(database: str, tmp_path: Path) -> Path:
    """Return a backup of the database."""
    done = flask("backup", tmp_path / "backup", DATABASE_URL=as_url(database))
    assert done.returncode == 0, done.stderr
    return tmp_path / "backup"


def query(database: str, statement: str) -> list[TupleRow]:
    """Run a statement and return its rows."""
    with psycopg.connect(database, autocommit=True) as db:
        return db.execute(statement.encode()).fetchall()


def rows(database: str) -> list[list[TupleRow]]:
    """Return the tasks, the keys, the migrations and the state of the ids of a database."""
    return [
        query(database, "SELECT tasks::text FROM tasks ORDER BY id"),
        query(database, "SELECT idempotency_keys::text FROM idempotency_keys ORDER BY key"),
        query(database, "SELECT migration_id FROM _yoyo_migration ORDER BY 1"),
    ]


def tables_in(database: str) -> list[str]:
    """Return the names of all tables of a database."""
    return [name for (name,) in query(database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]


@contextmanager
def transaction(database: str, *commands: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Begin a transaction with commands. It is rolled back after the block, unless the block ends it."""
    with psycopg.connect(database) as db:
        for command in commands:
            db.execute(command.encode())
        yield db
        db.rollback()


def waiting_for_lock(database: str) -> bool:
    """Return whether a session of the database waits for a lock."""
    found = query(
        database, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    return bool(found)


# ---- a backup and its restore


@pytest.mark.parametrize("is_migrated", [False, True])
def test_a_restored_service_goes_on_where_it_was(
    is_migrated: bool, database: str, empty: str, tmp_path: Path, start: Start
) -> None:
    service = start(DATABASE_URL=as_url(database), USER_ID="alice").wait()
    key = {"Idempotency-Key": "key"}
    created = service.client.post("/api/tasks", json={"title": "once"}, headers=key)
    service.client.delete(f"/api/tasks/{service.client.post('/api/tasks', json={'title': 'gone'}).json()['id']}")
    before = service.client.get("/api/tasks")
    done = flask("backup", tmp_path / "a backup", DATABASE_URL=as_url(database))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"The backup is in {tmp_path}/a backup: 4 tasks, [\d,]+ bytes\.\n", done.stdout)
    if is_migrated:  # as a first start leaves it
        assert flask("migrate", DATABASE_URL=as_url(empty)).returncode == 0
    expected = rows(database)
    done = flask("restore", tmp_path / "a backup", DATABASE_URL=as_url(empty))
    assert (done.returncode, done.stdout) == (0, "The backup is restored: 4 tasks and 2 idempotency keys.\n")
    assert rows(empty) == expected
    restored = start(DATABASE_URL=as_url(empty), USER_ID="alice").wait()
    after = restored.client.get("/api/tasks")
    assert (after.content, after.headers["ETag"]) == (before.content, before.headers["ETag"])
    assert restored.client.post("/api/tasks", json={"title": "next"}).json()["id"] == 7
    assert restored.client.post("/api/tasks", json={"title": "once"}, headers=key).json() == created.json()
    assert restored.client.post("/api/tasks/2/toggle").json()["version"] == 8
    done = flask("check", DATABASE_URL=as_url(empty))
    assert (done.returncode, "row-level security holds" in done.stdout) == (0, True), done.stdout
    assert "the database already has 5 tasks" in message(
        flask("restore", tmp_path / "a backup", DATABASE_URL=as_url(empty))
    )
    assert [service.stop(), restored.stop()] == [0, 0]


def test_the_ids_of_an_emptied_database_are_not_given_again(backup: Path, empty: str) -> None:
    apply_migrations(empty)
    query(empty, "SELECT setval('tasks_id_seq', 41)")
    assert flask("restore", backup, DATABASE_URL=as_url(empty)).returncode == 0
    assert query(empty, "INSERT INTO tasks (user_id, title) VALUES ('a', 'b') RETURNING id") == [(42,)]


def test_a_damaged_number_in_the_file_gives_no_id_twice(backup: Path, empty: str) -> None:
    data = backup.read_bytes()  # rows have checksums, this number has none
    assert data.count(b"_id_seq', 4, true)") == 1
    backup.write_bytes(data.replace(b"_id_seq', 4, true)", b"_id_seq', 1, true)"))
    assert flask("restore", backup, DATABASE_URL=as_url(empty)).returncode == 0
    assert query(empty, "INSERT INTO tasks (user_id, title) VALUES ('a', 'b') RETURNING id") == [(4,)]


def test_a_backup_is_consistent_while_clients_write(database: str, empty: str, tmp_path: Path) -> None:
    with psycopg.connect(database) as db:  # so that the backup takes a moment
        db.execute(
            "INSERT INTO tasks (user_id, title, description)"
            " SELECT 'many', n::text, repeat(md5(n::text), 50) FROM generate_series(1, 20000) AS n"
        )
    has_ended = threading.Event()

    def write_pairs() -> None:
        with psycopg.connect(database) as db:
            while not has_ended.is_set():
                db.execute("INSERT INTO tasks (user_id, title) VALUES ('pair', 'both')")
                db.execute("INSERT INTO idempotency_keys SELECT 'pair', gen_random_uuid(), '{}', 1")
                db.commit()

    writer = threading.Thread(target=write_pairs)
    writer.start()
    try:
        done = flask("backup", tmp_path / "backup", DATABASE_URL=as_url(database))
    finally:
        has_ended.set()
        writer.join()
    assert done.returncode == 0, done.stderr
    assert flask("restore", tmp_path / "backup", DATABASE_URL=as_url(empty)).returncode == 0
    [(tasks,)] = query(empty, "SELECT count(*) FROM tasks WHERE user_id = 'pair'")
    [(keys,)] = query(empty, "SELECT count(*) FROM idempotency_keys WHERE user_id = 'pair'")
    [(written,)] = query(database, "SELECT count(*) FROM tasks WHERE user_id = 'pair'")
    assert 0 < tasks == keys < written
    [(new_id, largest)] = query(empty, "SELECT nextval('tasks_id_seq'), max(id) FROM tasks")
    assert new_id > largest


@pytest.mark.parametrize("number", range(1, len(MIGRATIONS)))
def test_a_backup_of_an_older_version_is_restored_and_migrated(
    number: int, conninfo: str, empty: str, tmp_path: Path
) -> None:
    folder = tmp_path / "migrations"
    shutil.copytree(statements.MIGRATIONS, folder)
    for path in folder.iterdir():
        if path.name > MIGRATIONS[number - 1] + "~":
            path.unlink()
    with new_database(conninfo) as older:
        assert apply_migrations(older, folder) == MIGRATIONS[:number]
        add_rows(older, tuple(tables_in(older)))
        done = flask("backup", tmp_path / "backup", DATABASE_URL=as_url(older))
        assert done.returncode == 0, done.stderr
        apply_migrations(older)
        expected = rows(older)
    for _ in range(2):
        done = flask("restore", tmp_path / "backup", DATABASE_URL=as_url(empty))
        assert done.returncode == 0, done.stderr
        assert rows(empty) == expected
        query(empty, "WITH keys AS (DELETE FROM idempotency_keys) DELETE FROM tasks RETURNING 1")  # is migrated now


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """Return a copy of the project that has one more migration, which changes rows and the name of a column."""
    folder = tmp_path / "newer"
    for name in ("sql", "todo_api"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "wsgi.py", folder)
    changes = {
        "": "ALTER TABLE tasks RENAME description TO notes; UPDATE tasks SET title = title || '!'",
        ".rollback": "ALTER TABLE tasks RENAME notes TO description",
    }
    for kind, change in changes.items():
        (folder / f"sql/migrations/9000.newer{kind}.sql").write_text(f"-- depends: {MIGRATIONS[-1]}\n{change};\n")
    return folder


@pytest.mark.parametrize("is_migrated", [False, True])
def test_later_migrations_change_the_rows_of_an_older_backup(
    is_migrated: bool, backup: Path, empty: str, newer: Path
) -> None:
    if is_migrated:
        assert flask("migrate", cwd=newer, DATABASE_URL=as_url(empty)).returncode == 0
    done = flask("restore", backup, cwd=newer, DATABASE_URL=as_url(empty))
    assert done.returncode == 0, done.stderr
    assert query(empty, "SELECT id, title, notes FROM tasks WHERE id <> 2") == [
        (1, "Buy milk!", "Buy milk"),
        (3, "Call!", None),
    ]
    assert "9000.newer" in message(flask("restore", backup, DATABASE_URL=as_url(empty)))


def test_a_backup_leaves_out_what_others_have_in_the_database(database: str, empty: str, tmp_path: Path) -> None:
    own = sorted(set(tables_in(database)) - {"_yoyo_log", "_yoyo_version"})
    with psycopg.connect(administrator(database)) as db:
        db.execute("CREATE TABLE theirs AS SELECT 'h-u-s-h' AS text")  # which the service may not read
        db.execute("CREATE SCHEMA other CREATE TABLE tasks (title text)")
    assert flask("backup", tmp_path / "backup", DATABASE_URL=as_url(database)).returncode == 0
    listed = subprocess.run(
        [BIN / "pg_restore", "--list", tmp_path / "backup"], capture_output=True, check=True, text=True
    )
    entries = re.findall(r"^\d+; \d+ \d+ (.*) \S+$", listed.stdout, re.MULTILINE)
    assert entries == [*(f"TABLE DATA public {name}" for name in own), "SEQUENCE SET public tasks_id_seq"]
    assert flask("restore", tmp_path / "backup", DATABASE_URL=as_url(empty)).returncode == 0


def test_tables_in_another_schema_and_in_partitions_are_backed_up(database: str, empty: str, tmp_path: Path) -> None:
    schema = 'od"d Schema'
    with psycopg.connect(database) as db:
        name = sql.Identifier(schema)
        db.execute("CREATE TABLE parts (LIKE idempotency_keys INCLUDING DEFAULTS) PARTITION BY HASH (user_id)")
        for number in range(2):
            db.execute(
                sql.SQL("CREATE TABLE {} PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER {})").format(
                    sql.Identifier(f"part{number}"), number
                )
            )
        db.execute("INSERT INTO parts SELECT 'user' || n, 'key', '{}', 1 FROM generate_series(1, 9) AS n")
        db.execute("ALTER TABLE idempotency_keys RENAME TO old; ALTER TABLE parts RENAME TO idempotency_keys")
        db.execute(sql.SQL("ALTER SCHEMA public RENAME TO {}").format(name))
        db.execute(sql.SQL("ALTER DATABASE {} SET search_path = {}").format(sql.Identifier(db.info.dbname), name))
    expected = rows(database)
    done = flask("backup", tmp_path / "backup", DATABASE_URL=as_url(database))
    assert done.returncode == 0, done.stderr
    done = flask("restore", tmp_path / "backup", DATABASE_URL=as_url(empty))
    assert done.returncode == 0, done.stderr
    assert (rows(empty), len(expected[1])) == (expected, 9)


# ---- the file


def test_the_file_can_have_any_name_and_only_its_owner_can_read_it(database: str, empty: str, tmp_path: Path) -> None:
    for name in ("-F p", "two\n'\"$(x)", "é" * 127):
        file = tmp_path / name
        script = 'umask 0; cd "$0" && exec "$@"'
        command = ["sh", "-c", script, str(tmp_path), *FLASK[:-1], str(ROOT / "wsgi.py")]
        variables = environment(DATABASE_URL=as_url(database))
        done = subprocess.run([*command, "backup", "--", name], env=variables, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (permissions(file), file.read_bytes()[:5]) == (0o600, b"PGDMP")
        variables = environment(DATABASE_URL=as_url(empty))
        done = subprocess.run([*command, "restore", "--", name], env=variables, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        query(empty, "WITH keys AS (DELETE FROM idempotency_keys) DELETE FROM tasks RETURNING 1")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_backup_overwrites_nothing_and_says_what_is_wrong_with_a_name(database: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    expected = {
        "file": "exists already",
        "folder": "exists already",
        "link": "exists already",
        "missing/backup": "No such file or directory",
        "file/backup": "Not a directory",
        "x" * 256: "File name too long",
    }
    for name, reason in expected.items():
        text = message(flask("backup", tmp_path / name, DATABASE_URL=as_url(database)))
        assert (f"{tmp_path / name}" in text, reason in text) == (True, True), text
    assert "name one instead of -" in message(flask("backup", "-", DATABASE_URL=as_url(database)))
    assert "name one instead of -" in message(flask("restore", "-", DATABASE_URL=as_url(database)))
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_a_file_that_may_not_be_read_is_one_line(database: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "file").chmod(0)
    as_user = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # root reads all
    for command, reason in (("backup", "exists already"), ("restore", "Permission denied")):
        done = subprocess.run(
            [*as_user, *FLASK, command, str(tmp_path / "file")],
            cwd=ROOT,
            env=environment(DATABASE_URL=as_url(database)),
            capture_output=True,
            text=True,
            check=False,
        )
        text = message(done)
        assert (f"{tmp_path / 'file'}" in text, reason in text) == (True, True), text


def test_a_file_that_is_created_during_the_backup_is_kept(database: str, tmp_path: Path) -> None:
    with transaction(database, "LOCK TABLE idempotency_keys"):
        process = started("backup", tmp_path / "backup", DATABASE_URL=as_url(database))
        wait_until(lambda: any(tmp_path.iterdir()))
        (tmp_path / "backup").write_text("mine")
    errors = process.communicate(timeout=120)[1]
    assert (process.returncode, "was created meanwhile" in errors) == (3, True), errors
    assert (tmp_path / "backup").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_backup_that_is_interrupted_leaves_no_file_of_that_name(
    number: signal.Signals, database: str, tmp_path: Path
) -> None:
    with transaction(database, "LOCK TABLE idempotency_keys"):
        process = started("backup", tmp_path / "backup", DATABASE_URL=as_url(database))
        wait_until(lambda: "pg_dump" in children(process.pid).values() and waiting_for_lock(database))
        [pg_dump] = [child for child, name in children(process.pid).items() if name == "pg_dump"]
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
        assert "Traceback" not in errors
        assert not (tmp_path / "backup").exists()
        left = [path.name for path in tmp_path.iterdir()]
        if number == signal.SIGKILL:
            assert re.fullmatch(r"\.todo_api-\w+\.unfinished", left[0])
        else:
            assert (left, pg_dump.is_running()) == ([], False)
            assert process.returncode == (1 if number == signal.SIGINT else 128 + number)
    pg_dump.wait(timeout=120)
    done = flask("backup", tmp_path / "backup", DATABASE_URL=as_url(database))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]


@pytest.mark.long
def test_a_backup_that_gets_no_lock_ends_with_one_line(database: str, tmp_path: Path) -> None:
    with transaction(database, "LOCK TABLE idempotency_keys"):
        text = message(flask("backup", tmp_path / "backup", DATABASE_URL=as_url(database)))
    assert "timeout" in text
    assert "LOCK TABLE public._yoyo_migration" in text
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_a_backup_with_one_line(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database) as db:
        db.execute(
            "INSERT INTO tasks (user_id, title, description)"
            " SELECT 'many', n::text, md5(n::text) FROM generate_series(1, 9999) AS n"
        )
    if os.geteuid():
        pytest.skip("only root can mount a small file system")
    script = f'mount -t tmpfs -o size=64k tmpfs {tmp_path}; "$@"; status=$?; ls -A {tmp_path}; exit $status'
    done = subprocess.run(
        [program("unshare"), "--mount", "sh", "-c", script, "", *FLASK, "backup", tmp_path / "backup"],
        cwd=ROOT,
        env=environment(DATABASE_URL=as_url(database)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No space left on device" in message(done)


# ---- files that are no backups


def damaged_files(backup: Path, database: str, folder: Path) -> dict[Path, str]:
    """Return files that cannot be restored, and a part of the message for each."""
    data = backup.read_bytes()
    contents = {
        "empty": (b"", "not a file that flask backup has written"),
        "text": (b"-- PostgreSQL database dump\n", "not a file that flask backup has written"),
        "half of the table of contents": (data[:400], "pg_restore failed"),
        "half": (data[: len(data) // 2], "pg_restore failed"),
        "without the last bytes": (data[:-200], "pg_restore failed"),
        "other bytes": (data[:-120] + bytes(40) + data[-80:], "pg_restore failed"),
    }
    found = {}
    for name, (content, reason) in contents.items():
        (folder / name).write_bytes(content)
        found[folder / name] = reason
    with psycopg.connect(database) as db:
        db.execute("CREATE TABLE strange (id) AS SELECT 1; ALTER TABLE tasks ADD COLUMN strange text")
        db.execute("INSERT INTO _yoyo_migration SELECT 'hash', '9999.newer', now()")
    ours = ["--table=_yoyo_migration", "--table=tasks"]
    dumps = {
        "foreign": (["--table=strange"], "not a backup of this service"),
        "more than rows": (["--data-only", "--inserts", *ours], "more than the rows"),
        "in another encoding": (["--data-only", "--encoding=LATIN1", ours[0]], "more than the rows"),
        "newer": (["--data-only", *ours], "migration 9999.newer, which sql/migrations lacks"),
    }
    for name, (arguments, reason) in dumps.items():
        command = [str(BIN / "pg_dump"), "--format=custom", f"--file={folder / name}", *arguments, database]
        subprocess.run(command, check=True)
        found[folder / name] = reason
    query(database, "DELETE FROM _yoyo_migration WHERE migration_id = '9999.newer' RETURNING 1")
    for name, arguments, reason in (
        ("other table", [*ours, "--table=strange"], "table strange"),
        ("other column", ours, "table tasks or columns of it"),
    ):
        command = [str(BIN / "pg_dump"), "-Fc", "--data-only", f"--file={folder / name}", *arguments, database]
        subprocess.run(command, check=True)
        found[folder / name] = reason
    os.mkfifo(folder / "pipe")
    no_files = {
        folder / "missing": "No such file or directory",
        folder: "is not a file",
        folder / "pipe": "is not a file",
    }
    return found | no_files


def test_a_file_that_is_no_complete_backup_changes_nothing(
    backup: Path, database: str, empty: str, tmp_path: Path
) -> None:
    for file, reason in damaged_files(backup, database, tmp_path).items():
        with pytest.raises(StartError) as raised:  # not on a command line, which would take a second for each file
            backups.restore(Settings(database_url=as_url(empty)), file, print)
        assert reason in str(raised.value), file.name
        assert tables_in(empty) == [], file.name


def test_a_file_that_is_no_backup_creates_no_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a backup")
    text = message(flask("restore", tmp_path / "file", DATA_DIR=tmp_path / "data"))
    assert f"{tmp_path}/file is not a file that flask backup has written" in text
    assert not (tmp_path / "data").exists()


# ---- other processes during a restore


def test_a_restore_that_is_killed_restores_nothing_or_all(
    backup: Path, empty: str, database: str, tmp_path: Path
) -> None:
    with psycopg.connect(database) as db:
        db.execute("INSERT INTO tasks (user_id, title) SELECT 'many', n::text FROM generate_series(1, 30000) AS n")
    assert flask("backup", tmp_path / "large", DATABASE_URL=as_url(database)).returncode == 0
    for _ in range(5):
        process = started("restore", tmp_path / "large", DATABASE_URL=as_url(empty))
        time.sleep(random.uniform(0.5, 1.5))
        process.kill()
        process.communicate(timeout=120)
        wait_until(lambda: not query(empty, SESSIONS))
        if "tasks" in tables_in(empty):
            assert query(empty, "SELECT count(*) FROM tasks") in ([(0,)], [(30003,)])
            query(empty, "WITH keys AS (DELETE FROM idempotency_keys) DELETE FROM tasks RETURNING 1")
    assert flask("restore", tmp_path / "large", DATABASE_URL=as_url(empty)).returncode == 0
    assert query(empty, "SELECT count(*) FROM tasks") == [(30003,)]


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_task_that_is_created_during_a_restore_is_kept(is_committed: bool, backup: Path, empty: str) -> None:
    apply_migrations(empty)
    with transaction(empty, "INSERT INTO tasks (user_id, title) VALUES ('a', 'b')") as db:
        process = started("restore", backup, DATABASE_URL=as_url(empty))
        wait_until(lambda: waiting_for_lock(empty))
        if is_committed:
            db.commit()
    errors = process.communicate(timeout=120)[1]
    if is_committed:
        assert (process.returncode, "the database already has 1 task and 0" in errors) == (3, True), errors
    else:
        assert process.returncode == 0, errors
    assert query(empty, "SELECT count(*) FROM tasks") == [(1 if is_committed else 3,)]


def test_one_of_two_restores_at_once_succeeds(backup: Path, empty: str) -> None:
    both = [started("restore", backup, DATABASE_URL=as_url(empty)) for _ in range(2)]
    errors = "".join(process.communicate(timeout=120)[1] for process in both)
    assert sorted(process.returncode for process in both) == [0, 3], errors
    assert "the database already has 3 tasks" in errors
    assert query(empty, "SELECT count(*) FROM tasks") == [(3,)]


# ---- servers and programs


def test_a_role_that_does_not_see_every_row_is_told_so(database: str, conninfo: str, tmp_path: Path) -> None:
    with psycopg.connect(administrator(database), autocommit=True) as db, ExitStack() as roles:
        name = "reader of backups"
        role = sql.Identifier(name)
        db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'h-u-s-h'").format(role))
        roles.callback(lambda: db.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role)))
        db.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}").format(role))
        url = as_url(make_conninfo(database, user=name, password=PASSWORD))
        text = message(flask("backup", tmp_path / "backup", DATABASE_URL=url))
        assert "row-level security hides rows of public.idempotency_keys and public.tasks" in text
        done = flask("backup", tmp_path / "backup", DATABASE_URL=url, MIGRATION_DATABASE_URL=as_url(database))
        assert done.returncode == 0, done.stderr


def test_a_database_without_tables_and_one_that_is_ahead_are_not_backed_up(
    database: str, empty: str, tmp_path: Path
) -> None:
    assert "there is nothing to back up" in message(flask("backup", tmp_path / "a", DATABASE_URL=as_url(empty)))
    with psycopg.connect(database) as db:
        db.execute("INSERT INTO _yoyo_migration SELECT 'hash', '9999.newer', now()")
    assert "ahead of this code" in message(flask("backup", tmp_path / "a", DATABASE_URL=as_url(database)))
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_database_is_one_line_without_the_password(backup: Path, tmp_path: Path) -> None:
    url = "postgresql://user:h-u-s-h@127.0.0.1:1/name"
    for command, file in (("backup", tmp_path / "new"), ("restore", backup)):
        text = message(flask(command, file, DATABASE_URL=url))
        assert ("Connection refused" in text, "h-u-s-h" in text) == (True, False)


def test_pg_dump_has_no_password_in_its_arguments(database: str, tmp_path: Path) -> None:
    url = as_url(make_conninfo(database, password=PASSWORD))
    with transaction(database, "LOCK TABLE idempotency_keys"):
        process = started("backup", tmp_path / "backup", DATABASE_URL=url)
        wait_until(lambda: waiting_for_lock(database))
        [pg_dump] = [child for child, name in children(process.pid).items() if name == "pg_dump"]
        arguments, variables = pg_dump.cmdline(), pg_dump.environ()
    assert process.wait(timeout=120) == 0
    process.communicate()
    assert ("h-u-s-h" in str(arguments), variables["PGPASSWORD"]) == (False, "h-u-s-h")


def test_progress_is_shown_on_a_terminal(database: str, backup: Path, empty: str, tmp_path: Path) -> None:
    with transaction(database, "LOCK TABLE idempotency_keys") as db, terminal() as (output, shown):
        command = [*FLASK, "backup", str(tmp_path / "new")]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(DATABASE_URL=as_url(database)), stderr=output)
        wait_until(lambda: "bytes written" in shown())
        db.rollback()
        assert process.wait(timeout=120) == 0
    with terminal() as (output, shown):
        command = [*FLASK, "restore", str(backup)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(DATABASE_URL=as_url(empty)), stderr=output)
        assert process.wait(timeout=120) == 0
        assert "100 % restored" in shown()


@contextmanager
def terminal() -> Iterator[tuple[int, Callable[[], str]]]:
    """Open a terminal. Yield its file descriptor, and a function that returns what it has shown."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    shown = b""

    def text() -> str:
        nonlocal shown
        with suppress(BlockingIOError):
            shown += os.read(ours, 10_000)
        return shown.decode()

    yield theirs, text
    os.close(theirs)
    os.close(ours)


@pytest.fixture
def bouncer(database: str) -> Iterator[pgbouncer.PgBouncer]:
    """Run a PgBouncer in transaction mode in front of the database."""
    assert pgbouncer.PROGRAM or program("pgbouncer")
    with pgbouncer.running(make_conninfo(database, dbname=None), default_pool_size=1) as running:
        yield running


def test_a_backup_needs_a_direct_url_and_a_restore_does_not(
    bouncer: pgbouncer.PgBouncer, database: str, empty: str, tmp_path: Path, start: Start
) -> None:
    pooled, file = as_url(bouncer.in_front_of(database)), tmp_path / "backup"
    for pooler in (False, True):
        text = message(flask("backup", file, DATABASE_URL=pooled, DATABASE_POOLER=pooler))
        assert "DATABASE_URL leads to a pooler" in text
        assert "set MIGRATION_DATABASE_URL" in text
    text = message(flask("backup", file, DATABASE_URL=as_url(database), MIGRATION_DATABASE_URL=pooled))
    assert "MIGRATION_DATABASE_URL leads to a pooler" in text
    direct: dict[str, Any] = {"MIGRATION_DATABASE_URL": as_url(database), "DATABASE_POOLER": True}
    assert flask("backup", file, DATABASE_URL=pooled, **direct).returncode == 0
    into = as_url(bouncer.in_front_of(empty))
    done = flask("restore", file, DATABASE_URL=into, DATABASE_POOLER=True)
    assert done.returncode == 0, done.stderr
    service = start(DATABASE_URL=into, DATABASE_POOLER=True, USER_ID="alice").wait()
    assert len(service.client.get("/api/tasks").json()) == 3
    assert service.stop() == 0


# ---- the embedded PostgreSQL


def test_backup_and_restore_start_the_embedded_server_or_leave_it_alone(tmp_path: Path, start: Start) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert "check DATA_DIR" in message(flask("backup", tmp_path / "backup", DATA_DIR=first))
    assert not first.exists()
    service = start(DATA_DIR=first).wait()
    created = service.client.post("/api/tasks", json={"title": "Buy milk"}).json()
    server = postmaster_in(first)
    assert flask("backup", tmp_path / "running", DATA_DIR=first).returncode == 0
    assert (postmaster_in(first), service.answers()) == (server, True)
    assert service.stop() == 0
    assert flask("backup", tmp_path / "stopped", DATA_DIR=first).returncode == 0
    done = flask("restore", tmp_path / "stopped", DATA_DIR=second)
    assert (done.returncode, done.stdout) == (0, "The backup is restored: 1 task and 0 idempotency keys.\n")
    assert servers_in(tmp_path) == []
    restored = start(DATA_DIR=second).wait()
    assert restored.client.get("/api/tasks").json() == [created]
    assert restored.stop() == 0
