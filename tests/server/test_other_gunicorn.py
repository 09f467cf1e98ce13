"""With another gunicorn than the tested one, the service logs a warning and uses gunicorn's own worker."""

import re
import sys
from pathlib import Path

import httpx
import pytest
from gunicorn.http import wsgi
from gunicorn.workers.gthread import ThreadWorker

from tests.support.fixtures import Start
from tests.support.processes import free_port
from todo_api.server import gunicorn_check
from todo_api.server.response import Response
from todo_api.server.worker import Worker

# Python imports this module at its start, if it finds it.
ANOTHER_VERSION = "import gunicorn\ngunicorn.__version__ = '99.0'\n"
WITHOUT_A_NAME = "from gunicorn.workers.gthread import ThreadWorker\ndel ThreadWorker._cap_keepalive\n"
CHANGES = [
    (ANOTHER_VERSION, "gunicorn is 99.0, but 27.0.1 was tested"),
    (WITHOUT_A_NAME, "gunicorn has no _cap_keepalive in gunicorn.workers.gthread:ThreadWorker"),
]


def overridden(ours: type, theirs: type) -> set[str]:
    """Return the attributes of a class of gunicorn that the service's class overrides."""
    return {name for name in vars(ours) if name in vars(theirs) and not name.startswith(("__doc", "__mod", "__firstl"))}


def test_each_overridden_name_is_checked() -> None:
    assert overridden(Worker, ThreadWorker) <= gunicorn_check.OVERRIDDEN["gunicorn.workers.gthread:ThreadWorker"]
    assert overridden(Response, wsgi.Response) <= gunicorn_check.OVERRIDDEN["gunicorn.http.wsgi:Response"]


def test_the_installed_gunicorn_is_the_tested_one() -> None:
    assert gunicorn_check.difference() is None


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_another_gunicorn_is_logged_once_and_serves_with_its_own_worker(
    change: str, reason: str, tmp_path: Path, database_url: str, start: Start
) -> None:
    (tmp_path / "sitecustomize.py").write_text(change)
    service = start(DATABASE_URL=database_url, PYTHONPATH=tmp_path, WEB_CONCURRENCY=2).wait()
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
    assert len(re.findall(rf"{re.escape(reason)}: serving with gunicorn's own worker", service.log())) == 1
    service.stop()


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_our_worker_ends_the_start_with_one_line_if_other_settings_name_it(
    change: str, reason: str, tmp_path: Path, database_url: str, start: Start
) -> None:
    (tmp_path / "sitecustomize.py").write_text(change)
    port = free_port()
    options = ["--bind", f"127.0.0.1:{port}", "--worker-class", "todo_api.server.worker.Worker"]
    command = [sys.executable, "-m", "gunicorn", *options, "wsgi:app"]
    service = start(command=command, PORT=port, DATABASE_URL=database_url, PYTHONPATH=tmp_path)
    assert service.process.wait(timeout=120) == 3
    lines = [line for line in service.log().splitlines() if line.startswith("todo_api: ")]
    assert lines == [f"todo_api: {reason}: set worker_class to gthread"]
    assert "Traceback" not in service.log()
