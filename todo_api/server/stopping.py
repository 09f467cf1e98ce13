"""How a stop refuses new connections instead of resetting them.

The kernel completes the handshake of a connection before it is accepted. When the listening socket is closed, those
that arrived after the last accept are reset. So a filter comes first: with it, the kernel ignores new attempts (SYN
segments), and the workers accept the connections that began before. A client repeats its attempt after a second. Then
it is refused, or accepted by a service that has started meanwhile.
"""

import ctypes
import logging
import mmap
import socket
import struct
from collections.abc import Iterable

_HANDSHAKE_TIME = 0.05  # seconds for handshakes in progress; more than a round trip within a data centre
_MASTER_TIME = 2.0  # seconds for the master to begin its stop, if the same signal was sent to it and to its workers

_SO_ATTACH_FILTER = 26  # Python lacks this constant of Linux
_TCP_FLAGS, _SYN = 13, 2  # the offset of the flags in a TCP header, and the flag of an attempt
_KEEP_ALL = 0xFFFF_FFFF  # bytes of a segment
# A "classic BPF" program (socket(7), SO_ATTACH_FILTER). Each instruction has a code, two jumps and a value.
_PROGRAM = (
    (0x30, 0, 0, _TCP_FLAGS),  # load a byte
    (0x45, 0, 1, _SYN),  # skip one instruction if none of these bits is set
    (0x06, 0, 0, 0),  # keep nothing
    (0x06, 0, 0, _KEEP_ALL),
)
_instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in _PROGRAM))
_filter = struct.pack("@HP", len(_PROGRAM), ctypes.addressof(_instructions))  # a struct sock_fprog

log = logging.getLogger(__name__)


class _Shared(ctypes.Structure):
    """What gunicorn's master tells the workers, which are forked from it."""

    # Workers up to an age close their sockets at once after a signal to stop. gunicorn counts the workers that it
    # starts; the age of a worker is its number.
    _fields_ = (("has_begun", ctypes.c_bool), ("greatest_age_to_close_at_once", ctypes.c_int))


_shared = _Shared.from_buffer(mmap.mmap(-1, ctypes.sizeof(_Shared)))
_shared.greatest_age_to_close_at_once = 2**31 - 1  # any age: other settings of gunicorn do not call prepare()


def prepare() -> None:
    """Let workers that get a signal to stop wait until the master calls ``begin``."""
    _shared.greatest_age_to_close_at_once = 0


def replace_workers(greatest_age: int) -> None:
    """Let the workers up to an age close their sockets at once, because others will accept the connections."""
    _shared.greatest_age_to_close_at_once = greatest_age


def begin(listeners: Iterable[socket.socket]) -> None:
    """Tell the workers that the service stops, and let the kernel ignore new connections to these sockets."""
    for listener in listeners:
        if listener.family != socket.AF_UNIX:  # gunicorn deletes the file of a Unix socket instead
            try:
                listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _filter)
            except OSError as error:
                log.debug("a few connections may be reset, because the kernel cannot ignore them: %s", error)
    _shared.has_begun = True


def has_begun() -> bool:
    """Return whether the service stops, and not only a worker of it."""
    return bool(_shared.has_begun)


def accept_time(age: int) -> float:
    """Return for how many seconds a worker of this age still accepts connections after a signal to stop.

    If the service stops, no worker may close its sockets before the kernel ignores new connections: nobody would accept
    those that arrive in between.
    """
    if _shared.has_begun:
        return _HANDSHAKE_TIME
    return 0 if age <= _shared.greatest_age_to_close_at_once else _MASTER_TIME
