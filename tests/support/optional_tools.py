"""Programs that a developer's machine may lack: a test that needs one is skipped there, and fails where CI is set."""

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.environment import ROOT

NPM = ROOT / "tests" / "npm"
# The programs of the tests' virtual environment come first, as if it were activated.
# Debian keeps servers in /usr/sbin.
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"])


def program(name: str) -> str:
    """Find a program, or skip the test that needs it."""
    return shutil.which(name, path=SEARCH_PATH) or missing(f"{name} is not installed")


def npm_program(name: str) -> str:
    """Find a program of tests/npm's packages, or skip the test that needs it."""
    program("node")
    found = shutil.which(name, path=NPM / "node_modules" / ".bin")
    return found or missing("the npm packages are not installed: npm ci --prefix tests/npm")


def missing(reason: str) -> NoReturn:
    """Skip a test that this machine can't run, or fail it where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
