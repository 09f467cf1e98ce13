"""gunicorn's settings, for ``python wsgi.py`` and ``gunicorn -c python:todo_api.gunicorn_conf wsgi:app``."""

import errno
import logging
import resource
import signal
import socket
import sys
import time
from typing import Any

from todo_api import database, middleware, startup
from todo_api.config import ROOT, fail, load  # not "config", which is one of gunicorn's settings

_settings = load()
middleware.configure_logging()
log = logging.getLogger("todo_api")


def _allowed_connections() -> int:
    """Raise the limit of open files, and give how many clients of one worker fit below it.

    It is often 1024, for the sake of programs that use select(). A worker that runs into it dies.
    """
    own = 100 + 4 * _settings.web_threads  # connections to PostgreSQL, selectors and the like
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = own + 10_000
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted - own if soft == resource.RLIM_INFINITY else min(soft, wanted) - own


chdir = str(ROOT)
bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.web_concurrency
worker_class = "todo_api.worker.Worker"
threads = _settings.web_threads  # by default 4: neither 2, 3 nor 8 were faster
worker_connections = _allowed_connections()
keepalive = 75  # seconds; longer than the load balancers in front, which otherwise race with the close
timeout = 30  # seconds without a sign of life from a worker
graceful_timeout = 10  # seconds for the requests at work when the service stops
forwarder_headers = ""  # a SCRIPT_NAME header would change the routing
secure_scheme_headers: dict[str, str] = {}  # nothing depends on the scheme; contradictory headers would be a 400
# With both of the above empty there is nothing to trust anybody with; not to look took 3 % off a read. Whoever fills
# one of them has to set this, too.
forwarded_allow_ips = "*"
control_socket_disable = True
errorlog = "-"
loglevel = "warning"  # when_ready says what is worth saying
accesslog = None  # our middleware logs each request, with its id


def on_starting(server: Any) -> None:
    """Make the database ready in the master, before there are workers."""
    for number in (signal.SIGTERM, signal.SIGINT):  # until gunicorn's own: an embedded server is stopped, too
        signal.signal(number, lambda *_: sys.exit(0))
    for address in server.cfg.address:  # not always HOST and PORT: ``python wsgi.py --bind`` goes before them
        if isinstance(address, tuple):
            _wait_for_port(*address)
    startup.prepare_or_fail(_settings)


def post_worker_init(worker: Any) -> None:
    """Connect before there are requests: after a reload they come at once."""
    database.connect(worker.wsgi)


def when_ready(server: Any) -> None:
    """Say where the service is."""
    cfg = server.cfg
    where = " ".join(cfg.bind)
    log.info("serving http://%s, its docs at /docs, with %d workers of %d threads", where, cfg.workers, cfg.threads)


def _wait_for_port(host: str, port: int) -> None:
    """Say in one line that a port is taken, before the database is started for nothing.

    Workers of a service that was just killed may hold it for another second.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + 3
    while True:
        try:
            with socket.create_server((host, port), family=family):
                return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                fail(f"HOST and PORT: can't listen on {host}, port {port}: {error.strerror}")
            time.sleep(0.1)


def pre_request(_worker: Any, request: Any) -> None:
    """Announce that the connection closes after a request whose body may be left unread, as gunicorn then does."""
    headers = dict(request.headers)
    if "TRANSFER-ENCODING" in headers or int(headers.get("CONTENT-LENGTH", 0)) > _settings.max_body_bytes:
        request.force_close()
