"""gunicorn's settings, for ``python wsgi.py`` and ``gunicorn -c python:todo_api.server.gunicorn_conf wsgi:app``."""

import dataclasses
import errno
import logging
import os
import resource
import signal
import socket
import time
from contextlib import suppress
from typing import Any

from gunicorn import systemd

from todo_api import database, draining, logs, startup, tokens

# gunicorn would take the name "config" for its setting.
from todo_api.config import NUMBERS, ROOT, is_loopback, take_variable
from todo_api.server import gunicorn_check, stopping

_settings = startup.load_settings()
logs.configure(_settings.log_format, _settings.log_level)
log = logging.getLogger("todo_api")


_OWN_FILES = 48  # of a worker without clients, in addition to those of its threads
_FILES_PER_THREAD = 2  # the connection to PostgreSQL, and one that is open briefly
_METRICS_FILES = 80  # with METRICS_PORT: the port, the memory, and clients
_INHERITED = "TODO_API_INHERITED"  # the variable with the file descriptors that a service passes on at SIGUSR2
_MOST_CLIENTS = 10_000
_FEWEST_CLIENTS = 16


def _open_files(wanted: int) -> int:
    """Raise the limit of open files, and return it.

    The limit is often 1024, for the sake of programs that use select(). A worker that reaches it dies.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)


def _max_connections(threads: int) -> int:
    """Return how many connections of clients a worker may accept below the limit of open files."""
    needed = _OWN_FILES + _FILES_PER_THREAD * threads + (_METRICS_FILES if _settings.metrics_port else 0)
    clients = (limit := _open_files(needed + _MOST_CLIENTS)) - needed
    if clients < _FEWEST_CLIENTS:
        startup.fail(
            f"this process may open {limit} files, and a worker with WEB_THREADS={threads} needs "
            f"{needed + _FEWEST_CLIENTS}: raise the limit (ulimit -n, or LimitNOFILE of systemd) or lower WEB_THREADS"
        )
    return clients


chdir = str(ROOT)
bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.web_concurrency
worker_class = "gthread" if gunicorn_check.difference() else "todo_api.server.worker.Worker"
threads = _settings.web_threads  # the default is 4, because 2, 3 and 8 were not faster
worker_connections = _max_connections(threads)
# Seconds. A proxy must close idle connections earlier; otherwise it may send a request while the worker closes one.
keepalive = 75
timeout = 30  # seconds; gunicorn kills a worker that gives no sign of life for longer
graceful_timeout = 10  # seconds for the requests in progress when the service stops
forwarder_headers = ""  # a SCRIPT_NAME header must not change the routing
secure_scheme_headers: dict[str, str] = {}  # nothing depends on the scheme, and contradictory headers would cause a 400
limit_request_line = 8190  # bytes; gunicorn's maximum
limit_request_fields = 50
sendfile = False  # a thread would wait for clients that read the docs page slowly
control_socket_disable = True  # gunicorn opens a control socket by default, and nothing here uses it
errorlog = "-"  # standard error
# At "info", without gunicorn's own lines about the start: when_ready logs the start.
loglevel = "warning" if _settings.log_level == "info" else _settings.log_level
if _settings.log_format == "json":
    logger_class = "todo_api.server.json_logger.JsonLogger"
accesslog = None  # the application logs each request with its id


def on_starting(server: Any) -> None:
    """Wait for the ports and prepare the database in the master, before it starts workers."""
    if difference := gunicorn_check.difference():
        log.warning("%s: serving with gunicorn's own worker", difference)
    _check(cfg := server.cfg)
    if _settings.local_only:
        _check_addresses(cfg)
    startup.exit_on(*startup.STOP_SIGNALS)  # until gunicorn sets its own handlers
    # After SIGUSR2, and if systemd activates the socket, gunicorn inherits its sockets.
    if not server.master_pid and not _systemd_sockets():
        for address in server.cfg.address:  # --bind takes precedence over HOST and PORT
            if isinstance(address, tuple):
                _wait_for_port(*address, names="HOST and PORT, or --bind")
    if server.cfg.reload:
        log.warning("--reload is ignored: new code, SQL and migrations need a restart or SIGUSR2")
    server.cfg.set("reload", False)
    if not difference:
        _fork_safely(server)
        _stop_without_resets(server)
    if _settings.metrics_port:
        _open_metrics_port(cfg, _settings.metrics_port)
    startup.prepare_or_fail(dataclasses.replace(_settings, web_concurrency=cfg.workers, web_threads=cfg.threads))


_metrics_ports: list[Any] = []  # one, or none without METRICS_PORT


def _open_metrics_port(cfg: Any, port: int) -> None:
    from todo_api.server import metrics_port

    if any(isinstance(address, tuple) and address[1] == port for address in cfg.address):
        startup.fail("METRICS_PORT and the port of --bind must be different ports")
    inherited = take_variable(_INHERITED)
    if not inherited:
        _wait_for_port(_settings.host, port, names="HOST and METRICS_PORT")
    try:
        _metrics_ports.append(metrics_port.open_port(_settings.host, port, inherited))
    except (AttributeError, OSError) as error:
        startup.fail(f"METRICS_PORT cannot be served, which needs Linux: {error}")


def pre_exec(server: Any) -> None:
    """Pass the metrics on to the service that SIGUSR2 starts. It continues to count, and uses the same port."""
    for port in _metrics_ports:
        server.cfg.env_orig[_INHERITED] = port.inheritable()


def _systemd_sockets() -> int:
    """Return how many sockets systemd has opened for this process. If its variables are invalid, end the process."""
    try:
        count: int = systemd.listen_fds(unset_environment=False)
    except ValueError as error:
        startup.fail(f"LISTEN_FDS and LISTEN_PID, which systemd sets, must be numbers: {error}")
    return count


def _fork_safely(server: Any) -> None:
    """Keep the service running if a worker cannot be started, because a limit of processes or memory is reached.

    gunicorn would end the service. It looks once a second whether workers are missing.

    A new worker has the master's handlers until it sets its own. They would lose a signal to stop, and the worker would
    serve until it is killed. So these signals are blocked until then.
    """
    from todo_api.server.worker import STOP_SIGNALS, Worker

    spawn_worker = server.spawn_worker
    is_logged = False

    def try_to_spawn_worker() -> None:
        nonlocal is_logged
        # Only our worker unblocks them.
        blocked = STOP_SIGNALS if issubclass(server.worker_class, Worker) else ()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            spawn_worker()
        except (OSError, RuntimeError) as error:
            if server.worker_age == 1:  # the first worker
                startup.fail(f"no worker can be started: {error}")
            if not is_logged:
                log.warning("a worker cannot be started; gunicorn tries again every second: %s", error)
            is_logged = True
        else:
            is_logged = False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    reexec = server.reexec

    def try_to_reexec() -> None:
        try:
            reexec()
        except OSError as error:
            log.warning("SIGUSR2: the new service cannot be started: %s", error)
            if os.getpid() != server.pid:
                os._exit(1)  # the process that should have become the new service

    server.spawn_worker, server.reexec = try_to_spawn_worker, try_to_reexec


def _stop_without_resets(server: Any) -> None:
    """Let the kernel ignore new connections before gunicorn closes the sockets, unless others use them afterwards."""
    stop = server.stop
    inherits = any(isinstance(address, int) for address in server.cfg.address)  # --bind fd://3

    def begin_and_stop(*args: Any) -> None:
        is_shared = inherits or server.systemd or _shares_its_port(server)
        stopping.begin([] if is_shared else server.LISTENERS)
        stop(*args)

    server.stop = begin_and_stop
    stopping.prepare()


def _check(cfg: Any) -> None:
    """Check gunicorn's options, which take precedence over the settings. If one is invalid, end the process."""
    for option, value in (("--workers", cfg.workers), ("--threads", cfg.threads)):
        if value not in NUMBERS:
            startup.fail(f"{option} must be between {NUMBERS.start} and {NUMBERS.stop - 1}")
    if not _settings.database_url and (cfg.uid, cfg.gid) != (os.geteuid(), os.getegid()):
        startup.fail(
            "with --user or --group, the workers may not use the embedded PostgreSQL: set DATABASE_URL, or start the "
            "service as that user"
        )
    if cfg.threads != threads and cfg.worker_connections == worker_connections:
        cfg.set("worker_connections", _max_connections(cfg.threads))


def _check_addresses(cfg: Any) -> None:
    """End the process if it would listen on an address that other machines can reach.

    A Unix socket is for users of this machine. After SIGUSR2, the sockets are those that the first start has checked.
    """
    activated = _systemd_sockets()  # they replace --bind
    addresses = range(systemd.SD_LISTEN_FDS_START, systemd.SD_LISTEN_FDS_START + activated) or cfg.address
    metrics = [(_settings.host, _settings.metrics_port)] if _settings.metrics_port else []
    for address in (*addresses, *metrics):
        name = _name_of(address) if isinstance(address, int) else address
        if isinstance(name, tuple) and not is_loopback(name[0]):
            startup.fail(
                f"without tokens, the service listens on loopback addresses only, not on {name[0] or 'all addresses'} "
                "(HOST, --bind or a socket of systemd): set AUTH_JWKS, or ALLOW_ANONYMOUS=true if something in front "
                "authenticates its clients"
            )


def _name_of(descriptor: int) -> Any:
    """Return the address of an inherited socket, or None if it is no socket, which gunicorn reports."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as inherited:
            return inherited.getsockname()
    except OSError:
        return None


def on_reload(server: Any) -> None:
    """Log that a reload does not load new code. The new workers are forks of the master, which has the old code."""
    server.cfg.set("reload", False)
    _check(server.cfg)  # gunicorn has read its options again
    stopping.replace_workers(server.worker_age)
    log.warning("SIGHUP replaces the workers: new code, SQL and migrations need a restart or SIGUSR2")


def post_worker_init(worker: Any) -> None:
    """Fetch the keys of tokens and connect to the database. After a reload, the first requests arrive at once."""
    for port in _metrics_ports:
        port.start()
    tokens.start_fetching()
    database.fill_pools(worker.cfg.threads)


def worker_exit(_server: Any, _worker: Any) -> None:
    """Respond to the scrapes that this worker has accepted."""
    for port in _metrics_ports:
        port.end()


def when_ready(server: Any) -> None:
    """Log where the service listens. From now on, SIGTERM drains it first, if DRAIN_SECONDS is set."""
    if _settings.drain_seconds:
        _drain_on_sigterm(server)
    cfg = server.cfg
    where = ", ".join(map(str, server.LISTENERS))  # systemd's sockets may be others than those of the settings
    docs = f"{_settings.url_prefix}{_settings.script_name}/docs"  # as the proxy's clients see it
    log.info("serving %s, its docs at %s, with %d workers (%d threads each)", where, docs, cfg.workers, cfg.threads)


def _drain_on_sigterm(server: Any) -> None:
    """Let the first SIGTERM begin to drain the service. The stop begins after DRAIN_SECONDS, or at the next SIGTERM.

    If SIGUSR2 has started another service on the same port, the stop begins at once: that one serves the requests.
    """
    stop: Any = signal.getsignal(signal.SIGTERM)  # gunicorn's handler
    seconds = _settings.drain_seconds

    def drain(number: int, frame: Any) -> None:
        is_master = os.getpid() == server.pid  # a worker has this handler until it sets its own
        if not is_master or draining.is_active() or _shares_its_port(server):
            stop(number, frame)
            return
        draining.begin()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with suppress(RuntimeError):  # the signal has interrupted a write to the log
            log.info("draining: /readyz returns 503, and the stop begins in %d s, or at the next SIGTERM", seconds)

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGALRM, lambda _number, frame: stop(signal.SIGTERM, frame))


def _shares_its_port(server: Any) -> bool:
    """Return whether SIGUSR2 has started another service, or another one has started this one, and both run."""
    return bool(server.reexec_pid or (server.master_pid and server.master_pid == os.getppid()))


def _wait_for_port(host: str, port: int, *, names: str) -> None:
    """Wait until a port is free. If it is not free after 3 s, end the process, before a database is started in vain.

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
                startup.fail(f"cannot listen on {host}, port {port} ({names}): {error.strerror}")
            time.sleep(0.1)
