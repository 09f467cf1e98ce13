"""The loads: wrk on an application, and pgbench on PostgreSQL alone."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.environment import environment
from tests.support.optional_tools import program
from todo_api.database.connection import OPTIONS
from todo_api.embedded import programs

from .candidates import Candidate
from .operations import Operation, for_pgbench

SCRIPT = Path(__file__).with_name("wrk.lua")


@dataclass(frozen=True)
class Result:
    """The result of a load: requests per second, percentiles in ms, and processor time per request in µs."""

    rate: float
    p50: float
    p99: float
    cpu: float


@dataclass(frozen=True)
class Load:
    """A load: the number of connections, the seconds, and whose tasks it uses.

    The first user has the tasks from the id ``first`` on, the second user the tasks after these, and so on.
    """

    connections: int
    seconds: int
    tasks: int  # of each user
    first: int = 1
    tokens: Path | None = None  # a file with a token of each user in a line; without it, there is one user


def wrk(candidate: Candidate, operation: Operation, load: Load) -> Result:
    """Put an application under load with wrk, and check that no request fails."""
    before = candidate.cpu_seconds()
    arguments = [operation.method, operation.path, operation.body, str(load.tasks), str(load.first)]
    arguments += [str(load.tokens)] if load.tokens else []
    command = [program("wrk"), "-t1", f"-c{load.connections}", f"-d{load.seconds}s", "--timeout=60s", "-s", str(SCRIPT)]
    run = subprocess.run([*command, candidate.url, "--", *arguments], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["failed"] == 0, (candidate.name, operation.name, run.stdout)
    done = seen["requests"] or 1  # a slow application may complete none
    candidate.settle()
    cpu = (candidate.cpu_seconds() - before) / done
    return Result(done / seen["seconds"], seen["p50"], seen["p99"], 1e6 * cpu)


def pgbench(conninfo: str, operation: Operation, load: Load) -> float:
    """Run an operation's statement with pgbench, and return the number of executions per second."""
    script, variables = for_pgbench(operation)
    command = [
        str(programs.find(None).folder / "pgbench"),
        "-n",
        "-M",
        "prepared",
        "-f",
        "-",
        "-c",
        str(load.connections),
    ]
    command += ["-j", str(min(load.connections, psutil.cpu_count() or 1)), "-T", str(load.seconds)]
    command += [f"--define={name}={value}" for name, value in variables.items()]
    run = subprocess.run(
        [*command, conninfo],
        input=f"\\set task_id random(1, {load.tasks})\n\\set n random(1, 1000000000)\n{script}\n;\n",
        capture_output=True,
        text=True,
        check=True,
        env=environment(PGOPTIONS=OPTIONS),
    )
    found = re.search(r"^tps = ([\d.]+)", run.stdout, re.MULTILINE)
    assert found, run.stdout
    return float(found[1])
