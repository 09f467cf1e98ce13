"""gunicorn: its settings, its worker, and its responses to unreadable requests. Only this package imports gunicorn."""

import sys
from pathlib import Path
from typing import NoReturn

from gunicorn.app import wsgiapp

from todo_api import startup
from todo_api.server.unreadable import install_problems

__all__ = ["install_problems", "run"]

_ARGUMENTS = ["-c", "python:todo_api.server.gunicorn_conf", "wsgi:app"]


def run() -> NoReturn:
    """Run gunicorn with our settings until it exits. The program's arguments are gunicorn's and take precedence."""
    if sys.argv[1:4] != _ARGUMENTS:  # on SIGUSR2, gunicorn runs this program again with all its arguments
        sys.argv[1:1] = _ARGUMENTS
    # Absolute, because gunicorn changes to the project's folder, and runs this path again on SIGUSR2.
    sys.argv[0] = str(Path(sys.argv[0]).resolve())
    try:
        sys.exit(wsgiapp.run(prog="gunicorn"))
    except (ImportError, OSError, OverflowError, RuntimeError, ValueError) as error:  # gunicorn lets some of them pass
        startup.fail(f"gunicorn cannot start, check its options: {error}")
