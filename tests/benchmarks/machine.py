"""The machine on which the benchmarks run."""

import platform
import re
from pathlib import Path

import psutil

from todo_api.embedded import programs


def describe() -> str:
    """Return the processor, its cores, the memory and the versions of Python and PostgreSQL as one text."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    [model, *_] = [*re.findall(r"^model name\s*: (.*)", text, re.MULTILINE), platform.machine()]
    memory = psutil.virtual_memory().total / 2**30
    version = Path(programs.find(None).folder / "../include/pg_config.h")
    found = re.search(r'PG_VERSION "([\d.]+)"', version.read_text()) if version.exists() else None
    postgres = f"PostgreSQL {found[1]}" if found else "the embedded PostgreSQL"
    return f"{model}, {psutil.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, {postgres}"
