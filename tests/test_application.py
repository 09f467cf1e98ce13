"""create_app only assembles the application: it needs no database, and a process can have several applications."""

import logging
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from tests.support.databases import as_url, new_database
from tests.support.environment import POOLER
from tests.support.fixtures import Start
from tests.support.processes import free_port, wait_until
from todo_api import create_app
from todo_api.config import Settings, StartError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

WRAPPED_MODULE = """
from werkzeug.middleware.proxy_fix import ProxyFix
from wsgi import app as inner
app = ProxyFix(inner)
"""


def settings_for(url: str) -> Settings:
    """Return settings with a database URL."""
    return Settings(database_url=url, database_pooler=bool(POOLER))


def test_create_app_opens_no_connection_starts_no_thread_and_does_not_configure_the_log() -> None:
    threads, handlers = set(threading.enumerate()), logging.getLogger().handlers[:]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(settings_for(f"postgresql://todo@127.0.0.1:{listener.getsockname()[1]}/todo"))
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert app.test_client().get("/healthz").status_code == 200
    assert set(threading.enumerate()) <= threads  # those of other tests may end meanwhile
    assert logging.getLogger().handlers == handlers


def test_create_app_raises_start_error_if_a_setting_is_invalid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PORT", "seventy")
    with pytest.raises(StartError, match="PORT"):
        create_app()


def test_each_application_has_its_own_database_and_outage(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    reachable = create_app(settings_for(database_url)).test_client()
    unreachable = create_app(settings_for(f"postgresql://todo@127.0.0.1:{port}/todo")).test_client()
    wait_until(lambda: reachable.get("/readyz").status_code == 200)  # a first connection may take long
    for _ in range(3):
        assert (reachable.get("/readyz").status_code, unreachable.get("/readyz").status_code) == (200, 503)
    assert reachable.post("/api/tasks", json={"title": "Buy milk"}).status_code == 201
    outages = [record.message for record in caplog.records if record.name == "todo_api.database.outage"]
    assert len(outages) == 1
    assert f"port {port} failed" in outages[0]


def test_an_application_whose_database_hangs_does_not_delay_another(database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hanging = create_app(
            settings_for(f"postgresql://todo@127.0.0.1:{listener.getsockname()[1]}/todo")
        ).test_client()
        with ThreadPoolExecutor(1) as pool:
            response = pool.submit(hanging.get, "/readyz")
            listener.accept()  # the service has begun to connect
            assert create_app(settings_for(database_url)).test_client().get("/readyz").status_code == 200
            assert response.result().status_code == 503


def test_applications_below_a_path_have_their_own_urls_and_log_lines(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    apps: dict[str, WSGIApplication] = {f"/{name}": create_app(settings_for(database_url)) for name in ("home", "work")}
    client = Client(DispatcherMiddleware(create_app(settings_for(database_url)), apps))
    for path in apps:
        created = client.post(f"{path}/api/tasks", json={"title": "Buy milk"}, headers={"Host": "localhost"})
        assert re.fullmatch(f"{path}/api/tasks/[0-9]+", created.headers["Location"])
        assert client.get(created.headers["Location"], headers={"Host": "localhost"}).json == created.json
    lines = [record.message for record in caplog.records if record.name == "todo_api.access"]
    assert [line.rpartition("/")[0] for line in lines] == [
        *("POST /home/api", "GET /home/api/tasks", "POST /work/api", "GET /work/api/tasks")
    ]


def test_an_application_in_other_middleware_is_connected_before_its_first_request(
    tmp_path: Path, conninfo: str, start: Start
) -> None:
    (tmp_path / "wrapped.py").write_text(WRAPPED_MODULE)
    command = [sys.executable, "-m", "gunicorn", "-c", "python:todo_api.server.gunicorn_conf", "wrapped:app"]
    with new_database(conninfo) as database:

        def connections() -> int:
            with psycopg.connect(conninfo) as db:
                query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = 'todo_api'"
                return len(db.execute(query, [conninfo_to_dict(database)["dbname"]]).fetchall())

        service = start(command=command, PYTHONPATH=tmp_path, DATABASE_URL=as_url(database), WEB_THREADS=3)
        wait_until(lambda: connections() == 3)
        assert service.wait().client.get("/api/tasks").status_code == 200
        assert service.stop() == 0
    assert "Traceback" not in service.log()
