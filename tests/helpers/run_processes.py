"""Real processes with CPU devices of their own, for tests of runs that have several."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from small_runs import ROOT
from xla_flags import xla_flags

CACHE = str(ROOT / ".pytest_cache" / "jax")  # as in conftest.py

# A program that runs `what` as process `number` of `count`, as a command would.
TALK = """
import os, sys
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
port, count, number, what = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
try:
    given = (f"127.0.0.1:{port}", count, number) if port else ()
    with processes.connect_processes(*given, wait=8, heartbeat=8):
        try:
            exec(what)
        except GrpoError as error:
            sys.exit(f"error: {error}")
except GrpoError as error:
    sys.exit(f"error: {error}")
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(
    command: list[str], devices: int, folder: Path = ROOT, **environment: str
) -> subprocess.Popen:
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}",
        "XLA_FLAGS": xla_flags(devices),
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def talk(what: str, count: int, numbers=None) -> list[subprocess.Popen]:
    return start_as(what, [(count, i) for i in (numbers or range(count))])


def start_as(what: str, told: list[tuple[int, int]]) -> list[subprocess.Popen]:
    """Processes of one run, each with the count and the number that it was told."""
    port = str(free_port())
    command = ["-c", TALK, port]
    return [launch([*command, str(n), str(i), what], devices=1) for n, i in told]


def slurm_of(count: int) -> list[dict[str, str]]:
    """What SLURM tells each of so many tasks of one host."""
    port = str(free_port())
    job = {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "JAX_COORDINATOR_PORT": port,
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }
    ranks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
    return [job | rank for rank in ranks]


def finish(processes: list[subprocess.Popen], within: float = 300):
    done = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=within)
        finally:
            process.kill()
        done.append(SimpleNamespace(code=process.returncode, out=out, err=err))
    return done
