"""Programs that a machine may lack: without them, the tests that need them are skipped, or fail if CI is set."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.environment import ROOT

NPM = ROOT / "tests" / "npm"
# What systemd and containers need of the kernel: control groups of their own, and file systems in layers.
_MOUNTS = """
mount -t tmpfs tmpfs /mnt
mkdir /mnt/groups /mnt/lower /mnt/upper /mnt/work /mnt/whole
mount -t cgroup2 cgroup2 /mnt/groups
mkdir /mnt/groups/todo_api.$$
rmdir /mnt/groups/todo_api.$$
mount -t overlay overlay -o lowerdir=/mnt/lower,upperdir=/mnt/upper,workdir=/mnt/work /mnt/whole
"""
# The programs of the tests' virtual environment come first, as if it were activated.
# Debian keeps servers in /usr/sbin.
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"])


def program(name: str) -> str:
    """Return the path of a program, or skip the test if the program is missing."""
    return shutil.which(name, path=SEARCH_PATH) or missing(f"{name} is not installed")


def npm_program(name: str) -> str:
    """Return the path of a program of the packages in tests/npm, or skip the test if it is missing."""
    program("node")
    found = shutil.which(name, path=NPM / "node_modules" / ".bin")
    return found or missing("the npm packages are not installed: npm ci --prefix tests/npm")


def require_mounts() -> None:
    """Skip the test if the kernel does not allow what systemd and containers need, even if CI is set.

    In contrast to a program, this cannot be installed: the tests may themselves run in a container.
    """
    command = [program("unshare"), "--mount", "sh", "-ec", _MOUNTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"control groups or overlays cannot be mounted here: {done.stderr.strip()}")


def missing(reason: str) -> NoReturn:
    """Skip a test that this machine cannot run, or fail it if CI is set."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
