"""Receives the signals to stop only where a start waits. Their handlers raise SystemExit, which is safe at few lines.

At another line it could leave a server whose process id nobody knows yet, or a lock that nobody releases.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


@contextmanager
def deferred() -> Iterator[None]:
    """Receive the signals at the end of a block, or in a block of ``received`` within it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def received() -> Iterator[None]:
    """Receive the signals during a block, and those that were deferred at its begin."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """Ignore the signals from now on. Only the main thread may call this."""
    done = False
    while not done:
        with suppress(SystemExit, KeyboardInterrupt):  # of a signal that has just arrived
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            done = True
