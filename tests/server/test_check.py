"""``flask check``: one line for each thing, exit status 0 or 1, and nothing is changed."""

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support import pgbouncer
from tests.support.commands import flask
from tests.support.databases import as_url, new_database
from tests.support.fixtures import Start
from tests.support.issuer import SigningKey, running_issuer
from tests.support.optional_tools import program
from tests.support.processes import postmaster_in, servers_in
from todo_api.database import apply_migrations

NAMES = [
    *("settings", "versions", "packages", "database", "pooler", "migrations", "role", "connections", "disk", "keys"),
]


@pytest.fixture
def database(conninfo: str) -> Iterator[str]:
    """Return the connection string of a database without tables."""
    with new_database(conninfo) as database:
        yield database


def lines(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the lines by their names, and check the order of the names, the exit status and that there is no more."""
    found = {line[5:].partition(": ")[0]: line for line in done.stdout.splitlines()}
    assert list(found) == NAMES, done.stdout
    assert all(re.match(r"(ok  |FAIL) \w+: \S", line) for line in found.values()), done.stdout
    assert done.returncode == any(line.startswith("FAIL") for line in found.values())
    assert "Traceback" not in done.stderr
    return found


def test_a_service_that_is_well_has_no_failure(database: str, start: Start) -> None:
    service = start(DATABASE_URL=as_url(database), WEB_CONCURRENCY=1).wait()
    done = flask("check", DATABASE_URL=as_url(database), WEB_CONCURRENCY=1, CORS_ORIGINS="https://one,https://two")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = lines(done)
    assert f"dbname={conninfo_to_dict(database)['dbname']}" in found["settings"]
    assert "CORS_ORIGINS=https://one,https://two" in found["settings"]
    assert "WEB_THREADS" not in found["settings"]
    assert re.search(r"todo_api \d.*, Python 3", found["versions"])
    assert "gunicorn 2" in found["packages"]
    assert re.search(r"PostgreSQL 1[5-8].*, UTF8, \d+ kB", found["database"])
    assert re.search(r"\d applied, none pending", found["migrations"])
    assert "todo_app, and row-level security holds" in found["role"]
    assert re.search(r"\d+ free, [5-6] open for services; this service needs 4", found["connections"])
    assert service.stop() == 0


def test_secrets_are_hidden(tmp_path: Path) -> None:
    secrets = "sslpassword=h-u-s-h&scram_client_key=h-u-s-h&oauth_client_secret=h-u-s-h"
    done = flask(
        "check",
        DATABASE_URL=f"postgresql://me:h-u-s-h@127.0.0.1:1/name?{secrets}",
        MIGRATION_DATABASE_URL="postgresql:///name?host=127.0.0.1&port=1&user=me&password=h-u-s-h",
        AUTH_JWKS="http://127.0.0.1:1/keys?secret=h-u-s-h",
        AUTH_ISSUER="a",
        AUTH_AUDIENCE="b",
    )
    found = lines(done)
    assert "h-u-s-h" not in done.stdout + done.stderr
    assert 'DATABASE_URL="user=me password=*** ' in found["settings"]
    assert found["keys"].startswith("FAIL keys: AUTH_JWKS")


def test_nothing_is_changed(database: str) -> None:
    found = lines(flask("check", DATABASE_URL=as_url(database)))
    assert re.search(r"FAIL migrations: \d pending \(0001.create-tasks, .*run flask migrate", found["migrations"])
    with psycopg.connect(database) as db:
        assert db.execute("SELECT 1 FROM pg_tables WHERE schemaname = 'public'").fetchall() == []


def test_a_database_that_is_ahead_and_lacks_rights_is_told(database: str) -> None:
    apply_migrations(database)
    with psycopg.connect(database) as db:
        db.execute("INSERT INTO _yoyo_migration SELECT 'hash', '9999.newer', now()")
    found = lines(flask("check", DATABASE_URL=as_url(database)))
    assert "FAIL migrations: the database is ahead of this code" in found["migrations"]
    assert re.search(r"FAIL role: .* lacks rights.*GRANT SELECT, INSERT", found["role"])
    found = lines(flask("check", DATABASE_URL=as_url(database), DATABASE_ROLE=""))
    assert found["role"] == "ok   role: none, so only the statements keep users apart"


def test_too_few_connections_are_told(database: str) -> None:
    done = flask("check", DATABASE_URL=as_url(database), WEB_CONCURRENCY=100, WEB_THREADS=100)
    assert "this service needs 10000: lower WEB_CONCURRENCY" in lines(done)["connections"]


def test_a_database_that_is_away_is_told_and_the_rest_is_shown() -> None:
    found = lines(flask("check", DATABASE_URL="postgresql://127.0.0.1:1/name"))
    assert "Connection refused" in found["database"]
    assert [name for name, line in found.items() if "not checked, because the database" in line] == [
        *("pooler", "migrations", "role", "connections"),
    ]


def test_a_database_that_is_silent_is_told_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        found = lines(flask("check", DATABASE_URL=f"postgresql://127.0.0.1:{port}/name?connect_timeout=1000"))
    assert "timeout expired" in found["database"]


def test_the_keys_of_the_issuer_are_fetched(database: str) -> None:
    with running_issuer(SigningKey()) as issuer:
        found = lines(flask("check", DATABASE_URL=as_url(database), **issuer.settings()))
        assert found["keys"] == "ok   keys: 1 that can verify tokens"
        issuer.keys.clear()
        found = lines(flask("check", DATABASE_URL=as_url(database), **issuer.settings()))
        assert found["keys"] == f"FAIL keys: AUTH_JWKS: {issuer.url}: it has no key that can be used"


def test_a_pooler_is_told(database: str) -> None:
    assert pgbouncer.PROGRAM or program("pgbouncer")
    with pgbouncer.running(make_conninfo(database, dbname=None)) as bouncer:
        url = as_url(bouncer.in_front_of(database))
        assert "set DATABASE_POOLER=true" in lines(flask("check", DATABASE_URL=url))["pooler"]
        found = lines(flask("check", DATABASE_URL=url, DATABASE_POOLER=True))
    assert "in transaction mode, as DATABASE_POOLER says" in found["pooler"]


def test_the_embedded_server_is_started_but_not_created(tmp_path: Path) -> None:
    found = lines(flask("check", DATA_DIR=tmp_path / "data"))
    assert "the first start of the service creates it" in found["database"]
    assert not (tmp_path / "data").exists()
    assert flask("migrate", DATA_DIR=tmp_path / "data").returncode == 0
    done = flask("check", DATA_DIR=tmp_path / "data")
    assert (done.returncode, servers_in(tmp_path)) == (0, []), done.stdout
    assert re.search(r"\d GiB free in ", lines(done)["disk"])


def test_a_running_embedded_server_is_left_alone(tmp_path: Path, start: Start) -> None:
    service = start(DATA_DIR=tmp_path / "data").wait()
    server = postmaster_in(tmp_path)
    assert flask("check", DATA_DIR=tmp_path / "data").returncode == 0
    assert (postmaster_in(tmp_path), service.answers()) == (server, True)
    assert service.stop() == 0


def test_an_invalid_setting_is_one_line() -> None:
    done = flask("check", PORT="many")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert '"PORT" invalid' in done.stderr
