"""gunicorn: its settings, its worker, and its responses to unreadable requests. Only this package imports gunicorn."""

import logging
import sys
from pathlib import Path
from typing import NoReturn

from gunicorn.app import wsgiapp

from todo_api import startup
from todo_api.config import Settings
from todo_api.server.unreadable import install_problems

__all__ = ["check_hooks", "install_problems", "run"]

_CONF = "todo_api.server.gunicorn_conf"
_ARGUMENTS = ["-c", f"python:{_CONF}", "wsgi:app"]

log = logging.getLogger(__name__)


def run() -> NoReturn:
    """Run gunicorn with our settings until it exits. The program's arguments are gunicorn's and take precedence."""
    if sys.argv[1:4] != _ARGUMENTS:  # on SIGUSR2, gunicorn runs this program again with all its arguments
        sys.argv[1:1] = _ARGUMENTS
    # Absolute, because gunicorn changes to the project's folder, and runs this path again on SIGUSR2.
    sys.argv[0] = str(Path(sys.argv[0]).resolve())
    startup.exit_on(*startup.STOP_SIGNALS)  # with --preload, gunicorn starts PostgreSQL before its hooks run
    try:
        sys.exit(wsgiapp.run(prog="gunicorn"))
    except (ImportError, OSError, OverflowError, RuntimeError, ValueError) as error:  # gunicorn lets some of them pass
        startup.fail(f"gunicorn cannot start, check its options: {error}")


def check_hooks(settings: Settings) -> None:
    """Log a warning if a setting is ignored because another server, or gunicorn with other settings, runs this."""
    if (settings.metrics_port or settings.drain_seconds) and _CONF not in sys.modules:
        log.warning("METRICS_PORT and DRAIN_SECONDS are ignored: they need the hooks of %s", _CONF)
