"""The capabilities that root may lack in a container."""

import os
import re
from pathlib import Path

ROOT = os.geteuid() == 0
_NUMBERS = {"dac_read_search": 2, "sys_ptrace": 19}


def root_lacks(capability: str) -> bool:
    """Return whether the tests run as root without a capability. Other users do without it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    bounding_set = int(re.findall(r"CapBnd:\t(\w+)", status)[0], 16)
    return ROOT and not bounding_set >> _NUMBERS[capability] & 1
