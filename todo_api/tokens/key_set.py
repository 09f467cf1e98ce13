"""Keeps the keys of the issuer up to date.

One thread in each process fetches them; requests wait for it half a second at most.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING
from weakref import WeakSet

from todo_api.tokens.errors import KeySetError, KeysUnavailableError

if TYPE_CHECKING:
    from todo_api.tokens.keys import Keys

WAIT = 0.5  # seconds for which a request may wait for keys
_REFRESH = 300.0  # seconds between two fetches
_RETRY = 10.0  # seconds after a fetch that failed
_RETRY_WITHOUT_KEYS = 1.0  # seconds
_PAUSE = 10.0  # seconds between two fetches that requests ask for; each request could name an unknown key
_KEPT = 24 * 3600.0  # seconds for which the keys stay valid if the issuer is away

log = logging.getLogger(__name__)


class KeySet:
    """The keys of an issuer."""

    def __init__(self, source: str, load: Callable[[], "Keys"]) -> None:
        """Create it without keys and without a thread, which would not survive a fork.

        ``source`` is for the log. The thread calls ``load``, which returns the keys or raises KeySetError.
        """
        self._source, self._load = source, load
        self.forget()
        _key_sets.add(self)

    def forget(self) -> None:
        """Return to the state without keys and without a thread, in a process that was forked."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._keys: Keys | None = None
        self._wanted = True  # whether a fetch is in progress, or is about to begin
        self._began = inf  # when the fetch in progress began; this and the following in monotonic seconds
        self._fetched = -inf  # when the last fetch that succeeded began
        self._asked = -inf  # when a request last asked for a fetch
        self._failure = ""  # what the log says about the last fetch

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._thread:  # the usual case needs no lock
            return
        with self._changed:
            if not self._thread:
                self._thread = threading.Thread(target=self._run, name="keys of tokens", daemon=True)
                self._thread.start()

    def current(self, deadline: float) -> "Keys":
        """Return the keys. If there are none yet, wait for the first fetch, until the deadline at most.

        Raises:
            KeysUnavailableError: there are no keys.

        """
        self.start()
        if not (keys := self._kept()):
            with self._changed:
                self._wait(deadline)
            keys = self._kept()
        if not keys:
            raise KeysUnavailableError
        return keys

    def newer(self, deadline: float) -> "Keys":
        """Return the keys after a fetch, or the current ones if requests may not ask for a fetch yet.

        Raises:
            KeysUnavailableError: the fetch is still in progress at the deadline, or there are no keys.

        """
        with self._changed:
            if not self._wanted and time.monotonic() - self._asked >= _PAUSE:
                self._asked = time.monotonic()
                self._wanted = True
                self._changed.notify_all()
            self._wait(deadline)
            keys = self._kept()
            if self._wanted or not keys:
                raise KeysUnavailableError
            return keys

    def _wait(self, deadline: float) -> None:
        """Wait for the fetch in progress, if there is one.

        Requests wait for the first half second of a fetch only. Otherwise, requests with unknown keys could occupy
        every thread while the issuer does not respond.
        """
        while self._wanted and (left := min(deadline, self._began + WAIT) - time.monotonic()) > 0:
            self._changed.wait(left)

    def _kept(self) -> "Keys | None":
        return self._keys if time.monotonic() - self._fetched < _KEPT else None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._wanted = True
                self._began = time.monotonic()
            pause = self._fetch()
            with self._changed:
                self._wanted = False
                self._began = inf
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wanted, timeout=pause)

    def _fetch(self) -> float:
        """Fetch the keys, and return the seconds until the next fetch."""
        began = time.monotonic()
        try:
            keys = self._load()
        except Exception as error:  # the thread must continue, whatever it is
            reason = str(error) if isinstance(error, KeySetError) else repr(type(error))
            self._log("the keys of tokens cannot be fetched", reason)
            return _RETRY if self._kept() else _RETRY_WITHOUT_KEYS
        if not self._keys or keys.listed != self._keys.listed:
            self._keys = keys  # without the tokens that the old keys have verified
        self._fetched = began
        if not keys.listed:  # the issuer has withdrawn all of its keys
            self._keys = None
            self._log("the key set has no key that can be used", "requests with a token fail")
            return _RETRY_WITHOUT_KEYS
        self._log("", "the keys of tokens are available again")
        return _REFRESH

    def _log(self, failure: str, text: str) -> None:
        """Log a failure when it begins, and when it has ended."""
        if failure != self._failure:
            self._failure = failure
            log.warning("%s (%s)", f"{failure}: {text}" if failure else text, self._source)


_key_sets: "WeakSet[KeySet]" = WeakSet()


def start_fetching() -> None:
    """Start to fetch the keys of each KeySet in this process."""
    for key_set in list(_key_sets):
        key_set.start()


def _forget_in_child() -> None:
    for key_set in list(_key_sets):
        key_set.forget()


os.register_at_fork(after_in_child=_forget_in_child)
