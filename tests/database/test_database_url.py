"""DATABASE_URL accepts each form of URL that libpq accepts, and rejects what libpq rejects."""

import pytest
from psycopg.conninfo import conninfo_to_dict

from todo_api import config
from todo_api.database import url as database_url

PASSWORD = "h-u-s-h"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://",
        "postgres://user@host",
        "postgresql:///name?host=/var/run/postgresql&port=5433",
        "postgresql://user:p%40ss%2Fword@one:5432,two:5433/name?target_session_attrs=read-write",
        "postgresql://user:p@[::1]:5432/name?sslmode=require",
        "postgresql://us%C3%A9r:pässwörd#$&+=!*();'\"[?@host/name?options=-c%20statement_timeout%3D5s",
    ],
)
def test_every_form_of_url_that_libpq_accepts_is_accepted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("PGTZ", "UTC")
    conninfo_to_dict(url)
    assert config.load().database_url == url


@pytest.mark.parametrize(
    "rest",
    [
        "host:abc/name",
        "host/name?sslmode=bogus",
        "host/name?target_session_attrs=zzz",
        "one,two/name?port=1,2,3",
        "host/name?connect_timeout=abc",
        "host/name?service=nosuch",
        "host/name?sslmode",
        "db..example/name",
        f"{'d' * 64}.example/name",
    ],
)
def test_a_url_that_libpq_rejects_is_rejected_without_the_password(rest: str) -> None:
    with pytest.raises(config.StartError, match="DATABASE_URL") as raised:
        database_url.check_url("DATABASE_URL", f"postgresql://user:{PASSWORD}@{rest}")
    assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize(
    "mistyped",
    [f"host:{PASSWORD}/name", f"{PASSWORD}..host/name", f"host/name?sslmode={PASSWORD}", f"host/name?{PASSWORD}=1"],
)
def test_no_part_of_a_mistyped_url_is_in_the_message(mistyped: str) -> None:
    with pytest.raises(config.StartError, match=r"DATABASE_URL: [a-z]+") as raised:
        database_url.check_url("DATABASE_URL", f"postgresql://{mistyped}")
    assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize("secret", ["sslpassword", "oauth_client_secret", "scram_client_key"])
def test_a_secret_that_psql_takes_only_as_an_argument_is_not_passed_to_it(secret: str) -> None:
    with pytest.raises(config.StartError, match=f"{secret} of the database's URL cannot be passed") as raised:
        database_url.libpq_variables(f"postgresql://user@host/name?{secret}={PASSWORD}")
    assert PASSWORD not in str(raised.value)


def test_a_url_whose_server_cannot_be_reached_is_accepted() -> None:
    url = "postgresql://user:p@127.0.0.1:1,localhost:2/name?sslmode=require&target_session_attrs=read-write"
    database_url.check_url("DATABASE_URL", url)
