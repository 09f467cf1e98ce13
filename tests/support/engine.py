"""A container engine under the name docker: buildah builds images, and podman runs them, without a daemon."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from tests.support.environment import ROOT
from tests.support.optional_tools import missing, program, require_mounts

# The real base image is in a registry. This one has the same distribution, the same version of Python, and its name.
_BASE = "docker.io/library/python:3.11-slim-bookworm"
_SUITE = "bookworm"
_PACKAGES = "ca-certificates,python3,python3-venv"
_STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "{0}/images"\nrunroot = "{0}/run"\n'
_ENGINE = """[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"  # crun does not support version 1 of control groups beside version 2
[containers]
log_driver = "k8s-file"
netns = "slirp4netns"  # changes nothing in the network of this machine
default_ulimits = [{limits}]
"""
# The packages come from a folder, so the build needs no network. On a read-only file system, podman makes /tmp and /run
# writable by default. Docker does not.
_DOCKER = """#!/bin/sh
command=$1
shift
case $command in
build)
    exec buildah build --isolation chroot --format docker --layers --pull-never \\
        --volume {0}/wheels:/wheels:ro --volume {0}/pip.conf:/etc/pip.conf:ro "$@" ;;
run) exec podman run --read-only-tmpfs=false "$@" ;;
*) exec podman "$command" "$@" ;;
esac
"""


def _hard_limits() -> dict[str, int]:
    names = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    return {name: resource.getrlimit(number)[1] % 2**64 for name, number in names.items()}  # infinity is -1


class Engine:
    """An engine with images and containers of its own in a folder."""

    def __init__(self, folder: Path) -> None:
        """Create the base image."""
        if os.geteuid():
            missing("only root can create the base image of containers")
        require_mounts()
        for name in ("buildah", "debootstrap", "podman", "runc", "slirp4netns"):
            program(name)
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bin" / "docker").write_text(_DOCKER.format(folder), encoding="utf-8")
        (folder / "bin" / "docker").chmod(0o755)
        (folder / "storage.conf").write_text(_STORAGE.format(folder), encoding="utf-8")
        # podman would raise the limits to its defaults, which root in a virtual machine or a container may not do.
        limits = ", ".join(f'"{name}={min(limit, 32_768)}"' for name, limit in _hard_limits().items())
        (folder / "containers.conf").write_text(_ENGINE.format(limits=limits), encoding="utf-8")
        (folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n", encoding="utf-8")
        self.environment = {
            "PATH": f"{folder}/bin:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin",
            "HOME": str(folder),
            "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
            "CONTAINERS_CONF": f"{folder}/containers.conf",
            "DISABLE_HC_SYSTEMD": "true",  # no systemd runs the health checks; the tests do
        }
        self._download_packages()
        self._create_base()

    def _download_packages(self) -> None:
        """Download the packages of requirements.txt, from where pip on this machine finds them."""
        options = ["--quiet", "--only-binary=:all:", "--python-version=3.11", f"--dest={self.folder}/wheels"]
        command = [sys.executable, "-m", "pip", "download", *options, "-r", "requirements.txt"]
        subprocess.run(command, cwd=ROOT, check=True)

    def _create_base(self) -> None:
        root = self.folder / "root"
        # From where apt on this machine finds the packages of Debian.
        targets = ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"]
        listed = subprocess.run(targets, capture_output=True, text=True, check=True).stdout
        mirror = re.search(r"(?m)^\S+/debian/?$", listed)
        options = ["--variant=minbase", f"--include={_PACKAGES}"]
        command = ["debootstrap", *options, _SUITE, str(root), *([mirror[0]] if mirror else [])]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL)
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        for cache in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*")):
            cache.unlink()
        self.run(
            f"""container=$(buildah from scratch)
            buildah add --quiet $container {root} /
            buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin $container
            buildah commit --quiet --format docker --rm $container {_BASE}"""
        )
        subprocess.run(["rm", "-rf", "--one-file-system", root], check=True)

    def call(self, script: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run a shell script in a folder. Its docker is this engine."""
        return subprocess.run(
            ["sh", "-ec", script],
            cwd=folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, script: str, folder: Path = ROOT) -> str:
        """Run a shell script, check that it succeeds, and return its output."""
        done = self.call(script, folder)
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        return done.stdout.strip()

    def remove(self) -> None:
        """Remove all containers, volumes and images."""
        self.call("podman rm --all --force --time 0 --volumes; podman system reset --force")
