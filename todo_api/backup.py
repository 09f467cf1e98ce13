"""Writes a backup to a file, and restores it, with pg_dump and pg_restore."""

import errno
import fcntl
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from todo_api import config, database, embedded, startup
from todo_api.config import Settings, StartError

# A backup that is not complete has a name with these. If its process is killed, the next backup into the same folder
# removes it.
_PREFIX, _SUFFIX = ".todo_api-", ".unfinished"
# Errors of file systems that have no fsync for folders.
_WITHOUT_FSYNC = {errno.EBADF, errno.EINVAL}
_MAGIC = b"PGDMP"  # a file of pg_dump --format=custom begins with it
_INTERVAL = 0.5  # seconds between two calls of progress

Progress = Callable[[str], None]


def write(settings: Settings, file: Path, progress: Progress) -> str:
    """Write a backup to a new file, and return what it has. When this returns, the file is on the disk.

    Raises:
        StartError: there is such a file, it cannot be written, or the database cannot be backed up.
        UnavailableError: the database cannot be reached.

    """
    file = _absolute(file)
    if os.path.lexists(file):
        raise StartError(f"{file} exists already, and a backup overwrites nothing: choose another name")
    with _named_errors(file), _unfinished(file.parent) as (unfinished, descriptor):
        with database.snapshot(_direct_url(settings)) as snapshot:
            pg_dump = embedded.pg_dump(settings.postgres_bin, snapshot.major, needs_tls=snapshot.is_encrypted)
            variables, rest = database.program_parameters(snapshot.conninfo)
            config.set_libpq_variables(variables)
            command = [
                *(pg_dump, "--format=custom", "--data-only", "--encoding=UTF8", f"--snapshot={snapshot.name}"),
                *("--load-via-partition-root", "--strict-names", *(f"--table={name}" for name in snapshot.tables)),
                *("--no-password", "--lock-wait-timeout=10s", f"--dbname={rest}"),
                *("--no-sync", f"--file={unfinished}"),  # it is synced below
            ]
            _run(command, descriptor, lambda: progress(f"{unfinished.stat().st_size:,} bytes written"))
        os.fsync(descriptor)
        size = unfinished.stat().st_size
        _publish(unfinished, file)
    return f"{snapshot.tasks}, {size:,} bytes"


def restore(settings: Settings, file: Path, progress: Progress) -> str:
    """Restore a backup into the database, which has no tasks, and return what it had.

    Raises:
        StartError: the file is not a backup, the database has tasks, or it cannot be prepared.
        UnavailableError: the database cannot be reached.

    """
    file = _absolute(file)
    with _named_errors(file):
        if not stat.S_ISREG(file.stat().st_mode):
            raise StartError(f"{file} is not a file")
        with file.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                raise StartError(f"{file} is not a file that flask backup has written")
        command = [embedded.pg_restore(settings.postgres_bin), "--data-only", "--file=-", str(file)]
        contents = _contents(file, command)
        owner, _ = _owner_url(settings)
        with _output(command) as script:
            loaded = _Percentage(contents.size, progress)
            return database.restore(owner, contents, script, loaded.show)


class _Percentage:
    """Shows how much is done. It is called for each row, so it does little unless the percentage changes."""

    def __init__(self, size: int, progress: Progress) -> None:
        """Begin with nothing done."""
        self._size, self._progress = max(size, 1), progress
        self._next = 0

    def show(self, done: int) -> None:
        """Show that so many bytes are done."""
        if done >= self._next:
            percent = 100 * done // self._size
            self._next = (percent + 1) * self._size // 100 + 1
            self._progress(f"{percent} % restored")


def _absolute(file: Path) -> Path:
    if str(file) == "-":
        raise StartError("a backup is a file, so that it is on the disk and complete: name one instead of -")
    return Path.cwd() / file  # a name that begins with - is no option then


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Turn the errors of the system into StartErrors that name the file."""
    try:
        yield
    except OSError as error:
        raise StartError(f"{file}: {error.strerror or error}") from error


def _contents(file: Path, command: list[str]) -> database.Contents:
    """Read a backup to its end, and return what it has, before anything is changed."""
    try:
        with _output(command) as script:
            return database.check_backup(script)
    except StartError as error:
        raise StartError(f"{file} cannot be restored: {error}") from error


def _owner_url(settings: Settings) -> tuple[str, bool]:
    """Return the connection string of the role that owns the tables, and whether it leads to PostgreSQL itself.

    Before that, start an embedded server, or wait until a hosted one has woken up.
    """
    owner = startup.owner_url(settings, startup.ensure_server(settings))
    return owner, startup.patiently(lambda: database.has_session_settings(owner))


def _direct_url(settings: Settings) -> str:
    """Return the connection string of the role that owns the tables, which must not lead to a pooler.

    pg_dump changes settings of its session. In transaction mode, a pooler would give this session to the service.
    """
    if not settings.database_url and not embedded.exists(settings.data_dir):
        raise StartError(f"there is no PostgreSQL in {settings.data_dir} to back up: check DATA_DIR")
    owner, is_direct = _owner_url(settings)
    if not is_direct:
        name = "MIGRATION_DATABASE_URL" if settings.migration_database_url else "DATABASE_URL"
        raise StartError(
            f"{name} leads to a pooler, through which pg_dump does not work: set MIGRATION_DATABASE_URL to the URL of "
            "PostgreSQL itself"
        )
    return owner


@contextmanager
def _unfinished(folder: Path) -> Iterator[tuple[Path, int]]:
    """Create a file that only its owner can read, yield its path and its descriptor, and remove it after the block.

    The descriptor has a lock, which pg_dump inherits.
    """
    for left in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        _remove_if_unlocked(left)
    descriptor, name = tempfile.mkstemp(_SUFFIX, _PREFIX, folder)
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield Path(name), descriptor
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(descriptor)


def _remove_if_unlocked(left: Path) -> None:
    with suppress(OSError), left.open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left.unlink()


def _publish(unfinished: Path, file: Path) -> None:
    """Give a complete file its name, unless there is such a file by now, and write the name to the disk.

    Raises:
        StartError: there is such a file.

    """
    try:
        _rename(unfinished, file)
    except FileExistsError as error:
        raise StartError(
            f"{file} was created meanwhile, and a backup overwrites nothing: choose another name"
        ) from error
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _WITHOUT_FSYNC:
            file.unlink()  # it may be lost if the power fails
            raise
    finally:
        os.close(folder)


def _rename(unfinished: Path, file: Path) -> None:
    try:
        os.link(unfinished, file)
    except FileExistsError:
        raise
    except OSError:  # FAT and others have no links; there, a kill at this moment can leave an empty file
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        unfinished.rename(file)


def _run(command: list[str], descriptor: int, progress: Callable[[], None]) -> None:
    """Run pg_dump until it ends.

    Raises:
        StartError: it fails; the message has its errors.

    """
    with _process(command, subprocess.DEVNULL, (descriptor,)) as process:
        while True:
            try:
                errors = process.communicate(timeout=_INTERVAL)[1]
            except subprocess.TimeoutExpired:
                progress()
            else:
                break
    _check(command, process, errors)


@contextmanager
def _output(command: list[str]) -> Iterator[Iterator[bytes]]:
    """Run pg_restore, and yield the lines of its output. If it fails, the last of them is a StartError."""
    with tempfile.TemporaryFile() as errors, _process(command, subprocess.PIPE, (), errors) as process:

        def lines() -> Iterator[bytes]:
            if process.stdout:
                yield from process.stdout
            process.wait()
            errors.seek(0)
            _check(command, process, errors.read())

        yield lines()


@contextmanager
def _process(
    command: list[str], output: int, kept: tuple[int, ...], errors: IO[bytes] | int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program during a block, and end it if the block ends before."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, pass_fds=kept)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _check(command: list[str], process: subprocess.Popen[bytes], errors: bytes) -> None:
    if process.returncode:
        name = Path(command[0]).name
        text = errors.decode(errors="replace").replace(f"{name}: error: ", "") or f"status {process.returncode}"
        raise StartError(f"{name} failed: {text}")
