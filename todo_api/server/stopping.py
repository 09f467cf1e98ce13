"""How a stop refuses new connections without resetting any.

The kernel completes the handshake of a connection before it is accepted. When the listening socket is closed, those
that arrived after the last accept are reset. So a filter comes first: with it, the kernel ignores new attempts (SYN
segments), and the workers accept all connections that began before. A client repeats its attempt after a second. Then
it is refused, or accepted by a service that has started meanwhile.
"""

import ctypes
import mmap
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress

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

_flag = mmap.mmap(-1, 1)  # gunicorn's master sets it, and the workers, which are forked from the master, read it


def begin(listeners: Iterable[socket.socket]) -> None:
    """Tell the workers that the service stops, and let the kernel ignore new connections to these sockets."""
    for listener in listeners:
        if listener.family != socket.AF_UNIX:  # gunicorn deletes the file of a Unix socket instead
            with suppress(OSError):  # this kernel has no such filters, and a few connections may be reset
                listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _filter)
    _flag[0] = 1


def has_begun() -> bool:
    """Return whether the service stops, and not only a worker of it."""
    return bool(_flag[0])
