"""create_app only assembles: it needs no database, and several applications live side by side in one process."""

import logging
import socket
import sys
import threading
from pathlib import Path

import psycopg
import pytest

from tests.support.environment import POOLER
from tests.support.fixtures import Start
from tests.support.processes import free_port, wait_until
from todo_api import create_app
from todo_api.config import Settings, StartError

WRAPPED = """
from werkzeug.middleware.proxy_fix import ProxyFix
from wsgi import app as inner
app = ProxyFix(inner)
"""


def settings(url: str) -> Settings:
    """Return settings for a database."""
    return Settings(database_url=url, database_pooler=bool(POOLER))


def test_create_app_connects_to_nothing_starts_nothing_and_leaves_the_log_alone() -> None:
    threads, handlers = threading.active_count(), logging.getLogger().handlers[:]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(settings(f"postgresql://todo@127.0.0.1:{listener.getsockname()[1]}/todo"))
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert app.test_client().get("/healthz").status_code == 200
    assert (threading.active_count(), logging.getLogger().handlers) == (threads, handlers)


def test_create_app_with_an_invalid_setting_raises_and_does_not_end_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PORT", "seventy")
    with pytest.raises(StartError, match="PORT"):
        create_app()


def test_two_applications_have_a_database_and_an_outage_each(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    here = create_app(settings(database_url)).test_client()
    away = create_app(settings(f"postgresql://todo@127.0.0.1:{port}/todo")).test_client()
    for _ in range(3):
        assert (here.get("/readyz").status_code, away.get("/readyz").status_code) == (200, 503)
    assert here.post("/api/tasks", json={"title": "Buy milk"}).status_code == 201
    outages = [record.message for record in caplog.records if record.name == "todo_api.database.outage"]
    assert len(outages) == 1
    assert f"port {port} failed" in outages[0]


def test_an_application_within_other_middleware_is_connected_before_its_first_request(
    tmp_path: Path, database_url: str, conninfo: str, start: Start
) -> None:
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    command = [sys.executable, "-m", "gunicorn", "-c", "python:todo_api.server.gunicorn_conf", "wrapped:app"]
    url = f"{database_url}&application_name=wrapped"
    service = start(command=command, PYTHONPATH=tmp_path, DATABASE_URL=url, WEB_THREADS=3)

    def connected() -> int:
        with psycopg.connect(conninfo) as db:
            found = db.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'todo_api%'")
            return len(found.fetchall())

    wait_until(lambda: "serving" in service.log() and connected() > 0)
    assert service.wait().client.get("/api/tasks").status_code == 200
    assert "Traceback" not in service.log()
