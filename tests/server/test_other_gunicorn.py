"""With another gunicorn than the tested one, the service logs a warning and uses gunicorn's own worker."""

import re
from pathlib import Path

import httpx
import pytest
from gunicorn.http import wsgi
from gunicorn.workers.gthread import ThreadWorker

from tests.support.fixtures import Start
from todo_api.server import tested
from todo_api.server.response import Response
from todo_api.server.worker import Worker

# Python imports this module at its start, if it finds it.
ANOTHER_VERSION = "import gunicorn\ngunicorn.__version__ = '99.0'\n"
WITHOUT_A_NAME = "from gunicorn.workers.gthread import ThreadWorker\ndel ThreadWorker._cap_keepalive\n"


def overridden(ours: type, theirs: type) -> set[str]:
    """Return the attributes of a class of gunicorn that the service's class overrides."""
    return {name for name in vars(ours) if name in vars(theirs) and not name.startswith(("__doc", "__mod", "__firstl"))}


def test_each_overridden_name_is_checked() -> None:
    assert overridden(Worker, ThreadWorker) <= tested.OVERRIDDEN["gunicorn.workers.gthread:ThreadWorker"]
    assert overridden(Response, wsgi.Response) <= tested.OVERRIDDEN["gunicorn.http.wsgi:Response"]


def test_the_installed_gunicorn_is_the_tested_one() -> None:
    assert tested.difference() is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (ANOTHER_VERSION, "gunicorn is 99.0, and was tested as 27.0.1"),
        (WITHOUT_A_NAME, "gunicorn has no _cap_keepalive in gunicorn.workers.gthread:ThreadWorker"),
    ],
)
def test_another_gunicorn_is_logged_once_and_serves_with_its_own_worker(
    change: str, reason: str, tmp_path: Path, database_url: str, start: Start
) -> None:
    (tmp_path / "sitecustomize.py").write_text(change)
    service = start(DATABASE_URL=database_url, PYTHONPATH=tmp_path, WEB_CONCURRENCY=2).wait()
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
    assert len(re.findall(rf"{re.escape(reason)}: serving with gunicorn's own worker", service.log())) == 1
    service.stop()
