"""Programs that a machine may lack: without them, the tests that need them are skipped, or fail if CI is set."""

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
    """Return the path of a program, or skip the test if the program is missing."""
    return shutil.which(name, path=SEARCH_PATH) or missing(f"{name} is not installed")


def npm_program(name: str) -> str:
    """Return the path of a program of the packages in tests/npm, or skip the test if it is missing."""
    program("node")
    found = shutil.which(name, path=NPM / "node_modules" / ".bin")
    return found or missing("the npm packages are not installed: npm ci --prefix tests/npm")


def missing(reason: str) -> NoReturn:
    """Skip a test that this machine cannot run, or fail it if CI is set."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
