"""Surroundings like those in a container: namespaces of its own, and few capabilities."""

import os
import subprocess
from pathlib import Path

import psutil

from tests.support.capabilities import ROOT
from tests.support.optional_tools import missing, program
from tests.support.service import Service

# Root without the capabilities that Docker takes away, and that matter here.
FEW_CAPABILITIES = ["setpriv", "--bounding-set=-sys_ptrace,-dac_read_search"] if ROOT else []
# PostgreSQL does not run as root, even if it is root only in a user namespace. A second one inside restores the user.
_AS_ORIGINAL_USER = [] if ROOT else ["unshare", "--user", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"]


def container(temporary: Path, script: str = "", *, processes: bool = True) -> list[str]:
    """Return a prefix that runs a command in namespaces of its own, by default as process 1.

    The command has an empty temporary folder. ``script`` runs first.
    """
    temporary.mkdir(exist_ok=True)
    namespaces = ["--mount", *(["--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"] if processes else [])]
    command = [program("unshare"), *namespaces, *([] if ROOT else ["--map-root-user"])]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        missing("this machine allows no namespaces")
    mount = 'set -e; mount -t tmpfs tmpfs "$0"; export TMPDIR="$0"'
    return [*command, "sh", "-c", f'{mount}; {script or ":"}; exec "$@"', str(temporary), *_AS_ORIGINAL_USER]


def stop(service: Service) -> int:
    """Stop a service in a container and return its exit status."""
    [first] = psutil.Process(service.process.pid).children()
    service.client.close()
    first.terminate()
    return service.process.wait(timeout=120)
