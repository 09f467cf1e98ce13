"""gunicorn: its settings, its worker, and its answers to requests that it cannot read. Only this package imports it."""

import sys
from typing import NoReturn

from gunicorn.app import wsgiapp

from todo_api.server.unreadable import install as install_problems

__all__ = ["install_problems", "run"]


def run() -> NoReturn:
    """Become gunicorn with our settings; the program's arguments are gunicorn's and override them."""
    sys.argv[1:1] = ["-c", "python:todo_api.server.gunicorn_conf", "wsgi:app"]
    sys.exit(wsgiapp.run(prog="gunicorn"))
