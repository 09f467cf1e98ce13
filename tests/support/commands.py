"""The commands of ``flask``, run as on a command line."""

import subprocess
import sys
from pathlib import Path

from tests.support.environment import ROOT, environment

FLASK = [sys.executable, "-m", "flask", "--app", "wsgi"]


def flask(*arguments: object, cwd: Path = ROOT, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a flask command and wait for its end."""
    return subprocess.run(
        [*FLASK, *map(str, arguments)],
        cwd=cwd,
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def started(*arguments: object, **settings: object) -> subprocess.Popen[str]:
    """Start a flask command."""
    return subprocess.Popen(
        [*FLASK, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def message(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line with which a command failed, and check that there is no more than that and the log."""
    [line] = [line for line in done.stderr.splitlines() if " INFO todo_api." not in line]
    assert line.startswith("todo_api: "), done.stderr
    assert (done.returncode, done.stdout) == (3, "")
    return line
