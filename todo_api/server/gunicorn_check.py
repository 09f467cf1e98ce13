"""Checks that gunicorn is the tested version, and that it has the undocumented parts which this package overrides.

gunicorn documents its settings and hooks, but not the internals of its worker. If this check fails, our settings use
gunicorn's own worker. It works, but it tolerates fewer faults.
"""

import importlib
from functools import cache

import gunicorn

VERSION = "27.0.1"
_GTHREAD = "gunicorn.workers.gthread:ThreadWorker"
_RESPONSE = "gunicorn.http.wsgi:Response"
OVERRIDDEN = {
    _GTHREAD: {
        *("__init__", "init_process", "init_signals", "run", "accept", "enqueue_req", "handle", "finish_request"),
        *("murder_pending", "_cap_keepalive", "check_config", "handle_request", "handle_error"),
        *("handle_exit", "handle_quit", "wait_for_and_dispatch_events"),
    },
    _RESPONSE: {"start_response", "write", "default_headers"},
    "gunicorn.arbiter:Arbiter": {"spawn_worker", "reexec", "stop"},
    "gunicorn.http.wsgi": {"Response"},
    "gunicorn.http.body:Body": {"read"},
    "gunicorn.http.unreader:SocketUnreader": {"__init__", "chunk", "take_buffered", "unread"},
    "gunicorn.http.message": {"MAX_REQUEST_LINE"},
    "gunicorn.config:Config": {"__getattr__"},  # it looks up a setting if there is no attribute of that name
    "gunicorn.util": {"write_error", "write_nonblock"},
}


@cache
def difference() -> str | None:
    """Return how the installed gunicorn differs from the tested one, or None if it does not differ."""
    if gunicorn.__version__ != VERSION:
        return f"gunicorn is {gunicorn.__version__}, but {VERSION} was tested"
    for place, names in OVERRIDDEN.items():
        module, _, attribute = place.partition(":")
        try:
            found = importlib.import_module(module)
            found = getattr(found, attribute) if attribute else found
        except (ImportError, AttributeError):
            return f"gunicorn has no {place}"
        for name in sorted(names):
            if not hasattr(found, name):
                return f"gunicorn has no {name} in {place}"
    return None
