"""gunicorn's settings, for ``python wsgi.py`` and ``gunicorn -c python:todo_api.gunicorn_conf wsgi:app``."""

import errno
import logging
import resource
import signal
import socket
import sys
import time
from typing import Any

from todo_api import database, logs, startup
from todo_api.config import ROOT  # gunicorn has a setting named "config"
from todo_api.server import tested

_settings = startup.load_settings()
logs.configure()
log = logging.getLogger("todo_api")


def _max_connections() -> int:
    """Raise the limit of open files, and return how many clients of one worker fit below it.

    The limit is often 1024, because of programs that use select(). A worker that reaches it dies.
    """
    own = 100 + 4 * _settings.web_threads  # connections to PostgreSQL, selectors and so on
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = own + 10_000
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted - own if soft == resource.RLIM_INFINITY else min(soft, wanted) - own


chdir = str(ROOT)
bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.web_concurrency
worker_class = "gthread" if tested.difference() else "todo_api.server.worker.Worker"
threads = _settings.web_threads  # 4 by default: 2, 3 and 8 were no faster
worker_connections = _max_connections()
keepalive = (
    75  # seconds; longer than a proxy keeps idle connections, which could otherwise send a request while we close one
)
timeout = 30  # seconds without a sign of life from a worker
graceful_timeout = 10  # seconds for running requests when the service stops
forwarder_headers = ""  # a SCRIPT_NAME header must not change the routing
secure_scheme_headers: dict[str, str] = {}  # nothing depends on the scheme, and contradictory headers would be a 400
control_socket_disable = True
errorlog = "-"
loglevel = "warning"  # when_ready logs the start
accesslog = None  # the application logs each request with its id


def on_starting(server: Any) -> None:
    """Prepare the database in the master, before there are workers."""
    if difference := tested.difference():
        log.warning("%s: serving with gunicorn's own worker", difference)
    for number in (signal.SIGTERM, signal.SIGINT):  # until gunicorn sets its own; an exit stops an embedded server
        signal.signal(number, lambda *_: sys.exit(0))
    for address in server.cfg.address:  # of --bind, if that is given, instead of HOST and PORT
        if isinstance(address, tuple):
            _wait_for_port(*address)
    startup.prepare_or_fail(_settings)


def post_worker_init(_worker: Any) -> None:
    """Connect to the database before the first request: after a reload, requests arrive at once."""
    database.fill_pools()


def when_ready(server: Any) -> None:
    """Log where the service listens."""
    cfg = server.cfg
    where = " ".join(cfg.bind)
    log.info("serving http://%s, its docs at /docs, with %d workers of %d threads", where, cfg.workers, cfg.threads)


def _wait_for_port(host: str, port: int) -> None:
    """Wait until a port is free, or end the start with one line, before a database is started in vain.

    The workers of a service that was just killed may hold the port for another second.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + 3
    while True:
        try:
            with socket.create_server((host, port), family=family):
                return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                startup.fail(f"HOST and PORT: cannot listen on {host}, port {port}: {error.strerror}")
            time.sleep(0.1)
