"""DATABASE_URL is whatever libpq takes in such a URL, and nothing else."""

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
def test_every_form_of_a_url_that_libpq_takes_is_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_url_that_libpq_does_not_understand_is_refused(rest: str) -> None:
    with pytest.raises(config.StartError, match="DATABASE_URL") as raised:
        database_url.check_url("DATABASE_URL", f"postgresql://user:{PASSWORD}@{rest}")
    assert PASSWORD not in str(raised.value)


def test_a_url_whose_server_is_away_is_not_refused() -> None:
    url = "postgresql://user:p@127.0.0.1:1,localhost:2/name?sslmode=require&target_session_attrs=read-write"
    database_url.check_url("DATABASE_URL", url)
