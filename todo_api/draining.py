"""Whether the service drains: it still serves all requests, but is about to stop, and says so to load balancers."""

import mmap

_flag = mmap.mmap(-1, 1)  # gunicorn's master sets it, and the workers, which are forked from the master, read it


def begin() -> None:
    """Begin to drain, in all processes of the service."""
    _flag[0] = 1


def is_active() -> bool:
    """Return whether the service drains."""
    return bool(_flag[0])
