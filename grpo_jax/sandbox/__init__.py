"""Runs programs that a model wrote where they can do no harm.

A program is Python, with numpy and sympy at hand, and has limits on time, memory and
output. `mechanisms` builds the command that starts a server, in one of two ways:

- bubblewrap: namespaces without a network, without /proc, and with no files but the
  libraries; each program also has a /tmp of its own, of 16 MiB.
- Landlock: a program can read the libraries and write no file. It can still see whether
  a path exists.

`server` is that server: it forks for each program, and the fork drops all rights that
it will not need before it runs the program. Under both mechanisms seccomp refuses
new processes, sockets and signals to others, rlimits bound the resources, and there are
no capabilities. On a machine with neither there is no `Sandbox`, and no program runs.
"""

import atexit
import contextlib
import functools
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Literal

from grpo_jax.errors import GrpoError
from grpo_jax.sandbox import mechanisms

Status = Literal["ok", "error", "timeout", "output_limit"]
DEFAULT_WORKERS = (
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
)
START_SECONDS = 120.0
GRACE_SECONDS = 30.0  # that a reply may take beyond the program's wall time

# Runs before any other program, and checks that what must fail does fail.
PROBE = """
import os, socket
for forbidden in (os.fork, socket.socket, lambda: os.kill(os.getppid(), 9),
                  lambda: open('/etc/passwd'), lambda: open('/proc/self/environ'),
                  lambda: open('/usr/lib/grpo_jax', 'w')):
    try:
        forbidden()
    except OSError:
        continue
    raise SystemExit('not confined')
import numpy, sympy, colorsys
print('confined')
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed twice, which says nothing about the program."""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended, and what it printed until then.

    "error" is an exception, an exit code other than 0 or a signal; "timeout" is one of
    wall or CPU time. stdout and stderr together have at most `output_bytes`.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float  # wall time


class Sandbox:
    """A server and the programs under it. Any thread may run programs.

    Close it, or use it in a `with` statement.

    Args:
      mechanism: "bubblewrap" or "landlock"; by default the first that works here.

    Raises:
      GrpoError: no mechanism works on this machine.

    >>> with Sandbox() as sandbox:
    ...     results = sandbox.run_programs(["print(1)", "1 / 0", "exit(0)"])
    >>> [result.status for result in results]
    ['ok', 'error', 'ok']
    """

    def __init__(self, mechanism: str | None = None):
        self._lock = threading.Lock()
        self._server: _Server | None = None
        names = [mechanism] if mechanism else list(mechanisms.MECHANISMS)
        faults = []
        for self.mechanism in names:
            try:
                result = self.run_program(PROBE)
                if result.status == "ok" and result.stdout == "confined\n":
                    return
                fault = result.stderr.strip()[-300:]
            except (OSError, ValueError, SandboxError) as error:
                fault = str(error)
            faults.append(f"{self.mechanism}: {fault}")
            self.close()
        raise GrpoError(
            "sandbox: this machine has no way to confine a program; "
            f"`apt-get install bubblewrap` ({'; '.join(faults)})"
        )

    def run_program(
        self,
        program: str,
        *,
        wall_seconds: float = 10.0,
        cpu_seconds: float = 10.0,
        memory_bytes: int = 1 << 30,
        output_bytes: int = 1 << 16,
    ) -> ProgramResult:
        """Runs one program and returns how it ended.

        Args:
          program: Python source; it runs as `__main__`.
          wall_seconds: limit of elapsed time.
          cpu_seconds: limit of CPU time, rounded up to whole seconds.
          memory_bytes: limit of address space, of which Python, numpy and sympy take
            150 MB.
          output_bytes: limit of stdout and stderr together.

        Raises:
          GrpoError: a limit is not above 0.
          SandboxError: the sandbox itself failed, and again on a second attempt.
        """
        limits = {
            "wall_seconds": wall_seconds,
            "cpu_seconds": cpu_seconds,
            "memory_bytes": memory_bytes,
            "output_bytes": output_bytes,
        }
        for name, limit in limits.items():
            if not limit > 0:
                raise GrpoError(f"sandbox.{name}: {limit} is not above 0")
        fault = ""
        for _ in range(2):
            server = self._running_server()
            try:
                reply = server.send_request(
                    {"program": program, **limits}, wall_seconds
                )
            except (OSError, ValueError) as error:
                server.close()
                fault = f"{type(error).__name__} {server.fault}"
                continue
            if "failed" not in reply:
                return ProgramResult(**reply)
            fault = reply["failed"]
        raise SandboxError(f"sandbox: a program could not be run: {fault.strip()}")

    def run_programs(
        self, programs: Sequence[str], *, workers: int = DEFAULT_WORKERS, **limits
    ) -> list[ProgramResult]:
        """Runs several programs, `workers` at a time.

        Args:
          programs: Python sources.
          workers: how many programs run at the same time.
          **limits: of each program, as in `run_program`.

        Returns:
          The results, in the order of the programs.

        Raises:
          GrpoError, SandboxError: as `run_program`.
        """
        run = functools.partial(self.run_program, **limits)
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(run, programs))

    def close(self) -> None:
        """Ends the server; the next program starts another one."""
        with self._lock:
            if self._server is not None:
                self._server.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _running_server(self) -> "_Server":
        with self._lock:
            if self._server is None or self._server.process.poll() is not None:
                self._server = _Server(self.mechanism)
            return self._server


class _Server:
    """The process of `server.py`, and the socket on which it takes connections."""

    def __init__(self, mechanism: str):
        self.control, inner = socket.socketpair()
        self.errors: IO[bytes] = tempfile.TemporaryFile()
        self.fault = ""  # once closed: the last line that the process wrote to errors
        with inner:
            command, environment = mechanisms.MECHANISMS[mechanism](inner.fileno())
            self.process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[inner.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                cwd="/",
                start_new_session=True,  # Ctrl-C is the host's to handle
            )
        self.control.settimeout(START_SECONDS)
        with contextlib.suppress(OSError):
            if self.control.recv(16) == b"ready":
                return
        self.close()
        raise GrpoError(self.fault or "its server did not start")

    def send_request(self, request: dict, wall_seconds: float) -> dict:
        """Returns the reply to a request; raises OSError or ValueError if none came."""
        here, there = socket.socketpair()
        with here:
            with there:
                socket.send_fds(self.control, [b"+"], [there.fileno()])
            here.settimeout(wall_seconds + GRACE_SECONDS)
            here.sendall(json.dumps(request).encode() + b"\n")
            with here.makefile("rb") as reply:
                return json.loads(reply.readline())

    def close(self) -> None:
        """Closes the socket, upon which the server ends, and waits for its end."""
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ValueError):  # another thread was faster
            errors = os.pread(self.errors.fileno(), 1 << 16, 0).decode(errors="replace")
            self.fault = errors.strip().rpartition("\n")[2]
            self.errors.close()


_shared_lock = threading.Lock()


def shared_sandbox() -> Sandbox:
    """Returns the sandbox of this process, which the first call starts.

    Raises:
      GrpoError: no mechanism works on this machine.

    >>> shared_sandbox().run_program("import sympy; print(sympy.sqrt(8))").stdout
    '2*sqrt(2)\\n'
    """
    with _shared_lock:
        return _sandbox_of(os.getpid())


@functools.cache
def _sandbox_of(process: int) -> Sandbox:
    sandbox = Sandbox()
    # In a fork, the server still belongs to the parent.
    atexit.register(lambda: process == os.getpid() and sandbox.close())
    return sandbox
