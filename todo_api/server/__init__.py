"""gunicorn: its settings, its worker, and its responses to unreadable requests. Only this package imports gunicorn."""

import sys
from typing import NoReturn

from gunicorn.app import wsgiapp

from todo_api.server.unreadable import install_problems

__all__ = ["install_problems", "run"]


def run() -> NoReturn:
    """Run gunicorn with our settings until it exits. The program's arguments are gunicorn's and take precedence."""
    sys.argv[1:1] = ["-c", "python:todo_api.server.gunicorn_conf", "wsgi:app"]
    sys.exit(wsgiapp.run(prog="gunicorn"))
