"""A machine that systemd runs: process 1 of namespaces of its own, with the project in /opt/todo_api."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.support.optional_tools import missing, program, require_mounts
from tests.support.processes import wait_until

_SYSTEMD = "/usr/lib/systemd/systemd"
# The targets that the units name. Those of the distribution would start everything else that is installed.
_TARGETS = ["sysinit", "basic", "sockets", "network-online", "nss-lookup", "multi-user", "shutdown"]
# The processes of the machine are in a control group of their own, which becomes the root of its control groups.
_ENTER_GROUP = """
mkdir "$0/groups"
mount -t cgroup2 cgroup2 "$0/groups"
mkdir -p "$0/groups/$1"
echo $$ > "$0/groups/$1/cgroup.procs"
exec unshare --cgroup --mount --pid --ipc --uts --fork --kill-child --mount-proc sh -ec "$2" "$0" "$3" "$4"
"""
# What the machine writes to /etc, /opt and /var/lib goes to the folder of the test.
_BOOT = f"""
for name in etc opt var/lib; do
    mkdir -p "$0/$name/upper" "$0/$name/work"
    mount -t overlay overlay -o "lowerdir=/$name,upperdir=$0/$name/upper,workdir=$0/$name/work" "/$name"
done
mkdir /opt/todo_api /opt/python
mount --bind "$0/project" /opt/todo_api
mount --bind "$1" /opt/python
mount --bind "$2" /opt/todo_api/.venv/lib/python*/site-packages
mount -t tmpfs tmpfs /etc/systemd/system
mount -t tmpfs tmpfs /run
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec {_SYSTEMD} --system --unit=multi-user.target
"""


def _create_environment(folder: Path) -> None:
    """Create a virtual environment for the Python in /opt/python. Its packages will be mounted there.

    The Python of the tests may be in somebody's home, which the service cannot see.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / name / "site-packages").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(f"/opt/python/bin/{name}")
    (folder / "pyvenv.cfg").write_text("home = /opt/python/bin\n", encoding="utf-8")


class Machine:
    """A running systemd. It shares the network of this machine."""

    def __init__(self, folder: Path, port: int) -> None:
        """Boot it. ``folder`` has the project in the folder ``project``. The service will listen on the port."""
        if os.geteuid() or not Path(_SYSTEMD).exists():
            missing("systemd is not installed, or the tests do not run as root")
        require_mounts()
        (folder / "units").mkdir()
        for name in _TARGETS:
            (folder / "units" / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n", encoding="utf-8")
        _create_environment(folder / "project" / ".venv")
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.group = f"todo_api.{os.getpid()}"
        self.environment = {
            "PATH": f"{os.defpath}:/sbin:/usr/sbin",
            "SYSTEMD_UNIT_PATH": f"/etc/systemd/system:{folder}/units",
        }
        self.log = folder / "log"
        enter = [program("unshare"), "--mount", "sh", "-ec", _ENTER_GROUP]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*enter, folder, self.group, _BOOT, sys.base_prefix, sysconfig.get_path("purelib")],
                env=self.environment | {"container": "test", "SYSTEMD_LOG_TARGET": "console"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_until(self._is_up)

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            missing(f"systemd does not run in namespaces here: {self.log.read_text(encoding='utf-8')}")
        return not self._run("systemctl is-active --quiet multi-user.target").returncode

    def _run(self, script: str) -> subprocess.CompletedProcess[str]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii")
        if not children:
            return subprocess.CompletedProcess(script, 1)
        enter = [program("nsenter"), f"--target={children.split()[0]}", "--all", "sh", "-ec"]
        command = [*enter, f"cd /opt/todo_api\n{script}"]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def run(self, script: str) -> str:
        """Run a script as root in /opt/todo_api, check that it succeeds, and return its output."""
        done = self._run(script)
        assert done.returncode == 0, (script, done.stderr)
        return done.stdout

    def fails(self, script: str) -> bool:
        """Return whether a script fails."""
        return bool(self._run(script).returncode)

    def property(self, name: str, unit: str = "todo_api") -> str:
        """Return a property of a unit."""
        return self.run(f"systemctl show --property={name} --value {unit}").strip()

    def power_off(self) -> None:
        """Kill all processes, and remove the control group."""
        self.process.kill()
        self.process.wait(timeout=120)
        remove = 'mount -t cgroup2 cgroup2 "$0"; find "$0/$1" -depth -type d -exec rmdir {} +'
        command = [program("unshare"), "--mount", "sh", "-ec", remove, "/mnt", self.group]
        wait_until(lambda: not subprocess.run(command, capture_output=True, check=False).returncode)
