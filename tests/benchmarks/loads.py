"""The loads: wrk on an application, pgbench on PostgreSQL alone."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.environment import environment
from tests.support.optional_tools import program
from todo_api.database.connection import OPTIONS
from todo_api.embedded import cluster

from .candidates import Candidate
from .operations import Operation, for_pgbench

SCRIPT = Path(__file__).with_name("wrk.lua")


@dataclass(frozen=True)
class Result:
    """What a load has seen: requests in a second, milliseconds, and microseconds of processor time for a request."""

    rate: float
    p50: float
    p99: float
    cpu: float


@dataclass(frozen=True)
class Load:
    """How many connections, for how many seconds, on tasks with the ids from 1 to this."""

    connections: int
    seconds: int
    ids: int


def wrk(candidate: Candidate, operation: Operation, load: Load) -> Result:
    """Put an application under load, and see that no request fails."""
    before = candidate.cpu_seconds()
    arguments = [operation.method, operation.path, operation.body, str(load.ids)]
    command = [program("wrk"), "-t1", f"-c{load.connections}", f"-d{load.seconds}s", "--timeout=60s", "-s", str(SCRIPT)]
    run = subprocess.run([*command, candidate.url, "--", *arguments], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["failed"] == 0, (candidate.name, operation.name, run.stdout)
    done = seen["requests"] or 1  # it may be too slow for one
    candidate.settle()
    cpu = (candidate.cpu_seconds() - before) / done
    return Result(done / seen["seconds"], seen["p50"], seen["p99"], 1e6 * cpu)


def pgbench(conninfo: str, operation: Operation, load: Load) -> float:
    """Run an operation's statement in PostgreSQL alone and give how often it was done in a second."""
    script, variables = for_pgbench(operation)
    command = [str(cluster.bin_folder() / "pgbench"), "-n", "-M", "prepared", "-f", "-", "-c", str(load.connections)]
    command += ["-j", str(min(load.connections, psutil.cpu_count() or 1)), "-T", str(load.seconds)]
    command += [f"--define={name}={value}" for name, value in variables.items()]
    run = subprocess.run(
        [*command, conninfo],
        input=f"\\set task_id random(1, {load.ids})\n\\set n random(1, 1000000000)\n{script}\n;\n",
        capture_output=True,
        text=True,
        check=True,
        env=environment(PGOPTIONS=OPTIONS),
    )
    found = re.search(r"^tps = ([\d.]+)", run.stdout, re.MULTILINE)
    assert found, run.stdout
    return float(found[1])
