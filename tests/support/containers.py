"""Surroundings like those in a container: namespaces of its own, and few capabilities."""

import os
import subprocess
from pathlib import Path

import psutil

from tests.support.optional_tools import missing, program
from tests.support.service import Service

ROOT = os.geteuid() == 0
# Root without the capabilities that Docker takes away, and that matter here.
FEW_CAPABILITIES = ["setpriv", "--bounding-set=-sys_ptrace,-dac_read_search"] if ROOT else []
# PostgreSQL does not run as root, not even as root of a user namespace only. So another one is inside.
_AS_ONESELF = [] if ROOT else ["unshare", "--user", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"]


def container(temporary: Path, script: str = "", *, processes: bool = True) -> list[str]:
    """Return what precedes a command so that it runs in namespaces of its own, and is process 1 there.

    It has an empty temporary folder of its own. ``script`` runs first.
    """
    temporary.mkdir(exist_ok=True)
    namespaces = ["--mount", *(["--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"] if processes else [])]
    command = [program("unshare"), *namespaces, *([] if ROOT else ["--map-root-user"])]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        missing("no namespaces can be had")
    mount = 'set -e; mount -t tmpfs tmpfs "$0"; export TMPDIR="$0"'
    return [*command, "sh", "-c", f'{mount}; {script or ":"}; exec "$@"', str(temporary), *_AS_ONESELF]


def stop(service: Service) -> int:
    """Stop a service in a container and return its exit status."""
    [first] = psutil.Process(service.process.pid).children()
    service.client.close()
    first.terminate()
    return service.process.wait(timeout=60)
