"""Creates the cluster of the embedded PostgreSQL, and starts, finds and stops its server."""

import errno
import fcntl
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from todo_api.config import StartError
from todo_api.embedded import locks, socket_folder
from todo_api.embedded.programs import ENVIRONMENT, Programs

log = logging.getLogger(__name__)

# The user and group id of the user "nobody". Root runs initdb as this user.
_NOBODY = 65534
# Root's clusters belong to the first of these user ids that has no entry in /etc/passwd, and the server runs as this
# user. No other process does, so only root can open the server's socket. initdb opens no socket, and needs a user with
# an entry: it runs as nobody.
_OWN_USERS = range(58_432, 58_000, -1)
_STOP_TIMEOUT = 60  # seconds
_FIRST_WITH_BUILTIN_LOCALES = 17  # a major version of PostgreSQL
_START_TOLERANCE = 3  # seconds between the start of a process and the time that the process records
_ORPHANS_TIMEOUT = 5  # seconds; the processes of a postmaster that was killed end by themselves
_GROUP_OR_OTHERS = stat.S_IWGRP | stat.S_IRWXO  # PostgreSQL refuses a cluster with one of these permissions
# The bits of the capabilities in the masks of /proc/self/status. Root needs the first ones to create and start a
# cluster of another user, KILL to stop it, and the last two if that user cannot enter a folder.
_CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "SETGID": 6, "SETUID": 7}
_STOP_CAPABILITIES = {"KILL": 5}
_SEARCH_CAPABILITIES = {"DAC_READ_SEARCH": 2, "SETPCAP": 8}
# An error of the server, and not its response to a client that it does not serve now, such as our own ping.
_ERROR = re.compile("(?:FATAL|PANIC):(?!  the database system is )")
_FEWEST_CONNECTIONS = 100  # PostgreSQL's default
_MOST_CONNECTIONS = 5000  # the server allocates memory for each at its start


def create(cluster: Path, programs: Programs, lock: int) -> None:
    """Create an empty cluster. ``lock`` is the file descriptor of a lock, which initdb holds until it ends.

    Raises:
        StartError: initdb fails, or cannot run from its folder or as its user.

    """
    if unsafe := set('"$`\\\n') & set(str(programs.folder)):
        characters = " ".join(sorted(unsafe)).replace("\n", "a line break")
        raise StartError(
            f"initdb passes {programs.folder} to a shell, which does not take {characters} literally; "
            "install PostgreSQL in another folder"
        )
    before = as_owner(cluster, programs)
    before += _as_known_user(before)
    # initdb writes to another folder, which is renamed at the end. So the files that a killed initdb leaves behind are
    # never taken for a cluster.
    fresh = cluster.with_name("postgres.new")
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir()
    fresh.chmod(0o700)  # chmod ignores the umask
    if socket_folder.is_root():
        os.chown(fresh, _NOBODY, _NOBODY)
    log.info("creating a new PostgreSQL cluster in %s", cluster)
    programs.run(
        "initdb",
        f"--pgdata={fresh}",
        "--username=postgres",
        "--auth=trust",  # until the set-up is complete
        "--encoding=UTF8",
        # makes the sort order and lower() the same on every machine
        *(
            ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            if programs.major >= _FIRST_WITH_BUILTIN_LOCALES
            else ["--locale=C.UTF-8"]
        ),
        before=before,
        lock=lock,  # if the service is killed, initdb runs on, and the next start waits until it ends
    )
    take_from_nobody(fresh)
    fresh.rename(cluster)


def check_version(cluster: Path, programs: Programs) -> None:
    """Check that the programs have the version of the cluster.

    Raises:
        StartError: they have another version.

    """
    with suppress(OSError):  # the server itself says what is missing
        version = (cluster / "PG_VERSION").read_text(encoding="utf-8", errors="replace").strip()
        if version.isdecimal() and version != str(programs.major):
            raise StartError(
                f"PostgreSQL {version} created {cluster}, and {programs.folder} has PostgreSQL {programs.major}: run "
                f"flask backup FILE with POSTGRES_BIN set to the folder of the programs of PostgreSQL {version}, move "
                f"{cluster} away, and run flask restore FILE without it; or go on with PostgreSQL {version} there"
            )


def take_from_nobody(cluster: Path) -> None:
    """Give root's cluster, whose server does not run, to a user id that no other process runs as.

    An earlier version created clusters that belong to the user ``nobody``. If the file system does not allow the
    change, this logs a warning.
    """
    if not socket_folder.is_root() or cluster.stat().st_uid != _NOBODY:
        return
    user = next(user for user in _OWN_USERS if not _has_entry(user))
    try:
        # Links are followed, because pg_wal and tablespaces may be links. A process of the user nobody may have linked
        # to another user's files, so folders of other users are skipped.
        for _, folders, files, descriptor in os.fwalk(cluster, follow_symlinks=True):
            if os.fstat(descriptor).st_uid not in {_NOBODY, user}:
                folders.clear()
                continue
            for name in files:
                if os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_uid == _NOBODY:
                    os.chown(name, user, user, dir_fd=descriptor, follow_symlinks=False)
            if not os.path.samestat(os.fstat(descriptor), cluster.stat()):
                os.fchown(descriptor, user, user)
        os.chown(cluster, user, user)  # last, so that the next start continues if this one is killed
    except OSError as error:
        log.warning(
            "%s still belongs to the user nobody, and every process of that user can use this PostgreSQL: %s",
            *(cluster, error),
        )


def launch(cluster: Path, folder: Path, programs: Programs, connections: int = 100) -> subprocess.Popen[bytes]:
    """Start the server with its socket in a folder, and return its process. Its output goes to the log file.

    Raises:
        StartError: a server is already running, or the cluster's owner cannot run it.

    """
    before = as_owner(cluster, programs)
    _restrict(cluster)
    try:
        lock = locks.take(cluster.with_name("server.lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartError(f"another PostgreSQL runs in {cluster}") from error
    try:
        os.ftruncate(lock, 0)
        # No server is running, so these files are stale, even if another process now has the process id in them.
        for stale in (cluster / "postmaster.pid", folder / f"{socket_folder.SOCKET}.lock"):
            stale.unlink(missing_ok=True)
        quoted = str(folder).replace('"', '""')
        with _new_log(cluster) as output:
            server = subprocess.Popen(
                [
                    *before,
                    programs.path("postgres"),
                    "-D",
                    str(cluster),
                    "--listen-addresses=",
                    f"--port={socket_folder.PORT}",
                    f'--unix-socket-directories="{quoted}"',
                    "--unix-socket-permissions=0700",
                    f"--max-connections={min(max(connections, _FEWEST_CONNECTIONS), _MOST_CONNECTIONS)}",
                ],
                cwd="/",
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C must reach only the service, which then stops the server
                pass_fds=[lock],  # the server and all its processes hold it until they end
            )
        locks.record(lock, server.pid)
    finally:
        os.close(lock)
    return server


def is_stopping(cluster: Path) -> bool:
    """Return whether the server shuts down, as postmaster.pid says."""
    return _pid_file(cluster)[7:8] == [b"stopping"]


def _pid_file(cluster: Path) -> list[bytes]:
    """Return the lines of postmaster.pid, or none if it cannot be read."""
    try:
        return (cluster / "postmaster.pid").read_bytes().split(b"\n")
    except OSError:
        return []


def interrupt(found: list[psutil.Process]) -> bool:
    """Let a server shut down without waiting for its clients, and return whether this process was able to do that."""
    is_done = False
    for postmaster in found:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            postmaster.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
            is_done = True
    return is_done


def log_of(cluster: Path) -> Path:
    """Return the path of the server's log file."""
    return cluster.with_name("postgres.log")


def stop(cluster: Path, lock: locks.ServerLock) -> None:
    """Stop the server, and wait until it has ended, for 60 s at most. Log why it keeps running if it does."""
    folder = socket_folder.recorded(cluster)
    found = postmasters(cluster, lock)
    reason = "does not stop" if found else "cannot be stopped from here, perhaps because it runs in another container,"
    for postmaster in found:
        try:
            postmaster.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            reason = f"may not be stopped by this user (process {postmaster.pid})"
            found = []
    deadline = time.monotonic() + (_STOP_TIMEOUT if found else _ORPHANS_TIMEOUT)
    while lock.is_held() or postmasters(cluster, lock):
        if time.monotonic() > deadline:
            log.warning("the PostgreSQL in %s %s and keeps running", cluster, reason)
            return
        time.sleep(0.02)
    if folder:
        socket_folder.remove(folder, cluster)


def abandon(lock: locks.ServerLock) -> None:
    """End a server whose folder was moved or deleted, without a final checkpoint.

    PostgreSQL writes global/pg_control to the path with which it was started, even if its folder was moved. A copy that
    is at this path by now would be damaged.
    """
    if postmaster := lock.postmaster():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            postmaster.send_signal(signal.SIGQUIT)  # PostgreSQL's immediate shutdown, as if it had crashed
    deadline = time.monotonic() + _ORPHANS_TIMEOUT
    while lock.is_held() and time.monotonic() < deadline:
        time.sleep(0.02)


def postmasters(cluster: Path, lock: locks.ServerLock) -> list[psutil.Process]:
    """Return the topmost processes of the server: its postmaster, or the processes that a killed postmaster left.

    The server's lock names the postmaster. A server that was started by hand holds no such lock, and is found by its
    working directory, because the process id in postmaster.pid may belong to another process. Root in a container may
    not see this directory: then the time of the start must be the one in postmaster.pid. Nobody sees the directory of a
    process that has ended, and that its parent has not reaped yet.
    """
    if postmaster := lock.postmaster():
        return [postmaster]
    recorded = _recorded_start(cluster)
    servers = {
        process.pid: process
        for process in psutil.process_iter(["name", "status", "cwd", "ppid", "create_time"])
        if process.info["name"] == "postgres"
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and (process.info["cwd"] == str(cluster) if process.info["cwd"] else _is_start_of(process, *recorded))
    }
    return [process for process in servers.values() if process.info["ppid"] not in servers]


def _recorded_start(cluster: Path) -> tuple[int, int]:
    """Return the postmaster's process id and the time of its start in seconds, from postmaster.pid, or zeros."""
    try:
        pid, _, seconds, *_ = _pid_file(cluster)
        return int(pid), int(seconds)
    except ValueError:  # a short file, or a line that is no number
        return 0, 0


def _is_start_of(process: psutil.Process, pid: int, seconds: int) -> bool:
    return process.pid == pid and abs(process.info["create_time"] - seconds) < _START_TOLERANCE


def last_error(cluster: Path) -> str:
    """Return the last error in the server's log, with its details, or else the last line; and the path of the log."""
    log_file = log_of(cluster)
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    fatal = [number for number, line in enumerate(lines) if _ERROR.search(line)]
    if not fatal:
        return f"{(lines or ['it left no message'])[-1]} ({log_file})"
    message = [lines[fatal[-1]]]
    for line in lines[fatal[-1] + 1 :]:
        if "DETAIL: " not in line and "HINT: " not in line and not line.startswith("\t"):
            break
        message.append(line[max(line.find("DETAIL: "), line.find("HINT: "), 0) :])
    return f"{' '.join(message)} ({log_file})"


def check_disk(data_dir: Path) -> None:
    """Raise an OSError if the disk is full: the server's log, on the same disk, may lack the reason."""
    try:
        with tempfile.TemporaryFile(dir=data_dir) as probe:
            probe.write(bytes(64 * 1024))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise


def as_owner(cluster: Path, programs: Programs) -> list[str]:
    """Return a prefix with which root runs commands as the cluster's owner. It is empty for other users.

    PostgreSQL does not run as root.

    Raises:
        StartError: the cluster's owner cannot run the server.

    """
    data_dir = cluster.parent
    owner = cluster.stat() if cluster.exists() else None
    if not socket_folder.is_root():
        if owner and owner.st_uid != os.geteuid():
            raise StartError(
                f"{cluster} belongs to the user {_name(owner.st_uid)}; it must belong to the user "
                f"{_name(os.geteuid())}, who runs the service: chown -R {os.geteuid()} {data_dir}"
            )
        return []
    setpriv = shutil.which("setpriv")
    if not setpriv:
        raise StartError("root needs the program setpriv (of util-linux) to start the embedded PostgreSQL")
    user, group = (owner.st_uid, owner.st_gid) if owner and owner.st_uid else (_NOBODY, _NOBODY)
    _check_root(user, group)
    if owner and not owner.st_uid:
        raise StartError(
            f"{cluster} belongs to root, and PostgreSQL does not run as root: chown -R {_NOBODY}:{_NOBODY} {cluster}"
        )
    command = [setpriv, f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    folders = [folder for path in (cluster, programs.folder) for folder in path.parents if folder.exists()]
    if closed := [folder for folder in folders if not _can_search(folder, user, group)]:
        # A parent folder, such as /root, is closed to other users. The process gets a capability to read files and
        # search folders, but not to write. The alternative would be to open the folder to all users.
        if lacking := _lacking(_SEARCH_CAPABILITIES):
            is_of_data = closed[-1] in cluster.parents
            move = "set DATA_DIR to another folder" if is_of_data else "install PostgreSQL elsewhere"
            raise StartError(
                f"PostgreSQL runs as the user {_name(user)}, who cannot enter {closed[-1]}, and root lacks the "
                f"capabilities that would allow it ({', '.join(lacking)}): run chmod o+x {closed[-1]}, {move}, or add "
                "them"
            )
        command += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        command += ["--securebits=+no_setuid_fixup"]  # makes access(2), which initdb calls, respect the capability
    return command


def _can_search(folder: Path, user: int, group: int) -> bool:
    found = folder.stat()
    if found.st_uid == user:
        return bool(found.st_mode & stat.S_IXUSR)
    return bool(found.st_mode & (stat.S_IXGRP if found.st_gid == group else stat.S_IXOTH))


def _check_root(user: int, group: int) -> None:
    """Check that root may run a server as another user.

    Raises:
        StartError: root lacks a capability, or the user does not exist in root's user namespace.

    """
    elsewhere = "run the service as another user (docker run --user), or set DATABASE_URL"
    if _lacking(_CAPABILITIES):
        needed = _CAPABILITIES | _STOP_CAPABILITIES
        raise StartError(
            "PostgreSQL does not run as root, and root lacks capabilities to run it as another user: add "
            f"{', '.join(_lacking(needed))} (docker run --cap-add), {elsewhere}"
        )
    if not (_is_mapped("uid_map", user) and _is_mapped("gid_map", group)):
        raise StartError(
            f"PostgreSQL does not run as root, and in this user namespace there is no user {user} with the group "
            f"{group} to run it as: map more user and group ids, {elsewhere}"
        )


def _lacking(capabilities: dict[str, int]) -> list[str]:
    """Return those capabilities that root lacks or cannot pass on. Containers often take some away."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Cap"))
    owned = int(masks["CapPrm"], 16) & int(masks["CapBnd"], 16)
    return [name for name, bit in capabilities.items() if not owned >> bit & 1]


def _is_mapped(file: str, number: int) -> bool:
    """Return whether a user or group id exists in the user namespace of this process."""
    lines = Path("/proc/self", file).read_text(encoding="ascii").splitlines()
    ranges = (map(int, line.split()) for line in lines)
    return any(first <= number < first + count for first, _, count in ranges)


def _as_known_user(before: list[str]) -> list[str]:
    """Return a prefix with which initdb runs as a user with an entry in /etc/passwd, or nothing if its user has one.

    initdb requires an entry. The prefix creates a user namespace, in which the user has the id of another one. The
    files still belong to the real user.

    Raises:
        StartError: the system allows no user namespace.

    """
    user = _NOBODY if socket_folder.is_root() else os.geteuid()
    if _has_entry(user):
        return []
    substitute = next((entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid), _NOBODY)
    prefix = ["unshare", "--user", f"--map-user={substitute}"]
    try:
        subprocess.run([*before, *prefix, "true"], env=ENVIRONMENT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StartError(
            f"the user id {user} has no entry in /etc/passwd, and initdb needs one to create a cluster: add an entry, "
            "run the service as another user, or set DATABASE_URL"
        ) from error
    return prefix


def _has_entry(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def _restrict(cluster: Path) -> None:
    """Remove the permissions of the group and of other users.

    Kubernetes' fsGroup, for example, adds some to all folders of a volume.
    """
    if stat.S_IMODE(cluster.stat().st_mode) & _GROUP_OR_OTHERS:
        cluster.chmod(0o700)


def _new_log(cluster: Path) -> BinaryIO:
    log_file = log_of(cluster)
    with suppress(FileNotFoundError):
        log_file.replace(before := log_file.with_suffix(".log.1"))
        # An earlier version made it readable for all, and it can contain users' data. If root has started the service
        # in a user's folder, it may belong to root. It may also be a link, which root must not follow.
        with suppress(OSError), os.fdopen(os.open(before, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            os.fchmod(opened.fileno(), 0o600)
    return os.fdopen(locks.create(log_file), "wb")


def _name(user: int) -> str:
    return f"{pwd.getpwuid(user).pw_name} (id {user})" if _has_entry(user) else f"id {user}"
