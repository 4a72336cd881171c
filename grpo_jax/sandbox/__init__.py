"""Programs that a model wrote, run where they can do no harm.

In: Python programs (numpy and sympy are inside) and their limits. Out: for each a
`Result`: how it ended, what it printed, how long it took.

    mechanisms   how a server is started: under bubblewrap, else bare for Landlock
    server   the server: one fork a program, which gives up everything and then runs it

bubblewrap: namespaces with no network, no /proc and no files but the libraries; a
program also has a /tmp of its own, of 16 MiB. Landlock: the libraries can be read and
no file written (whether a path exists can still be seen). Under both: seccomp (no
processes, sockets, signals to others), rlimits, no capabilities. With neither there is
no `Sandbox`: a program is never just executed.
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
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
START_SECONDS = 120.0
GRACE_SECONDS = 30.0  # beyond its own wall time, before a program's keeper is given up

# Before any other program: what must fail does fail, and what must work works.
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


class SandboxFailed(RuntimeError):
    """The sandbox itself failed, twice; it says nothing about the program."""


@dataclass(frozen=True)
class Result:
    """How a program ended. `error`: an exception, an exit code, a signal.

    `timeout` is of wall or CPU time; stdout and stderr have what came before, and
    together at most `output_bytes`.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """One server and the programs under it; any thread may run some.

    Mechanism: "bubblewrap", "landlock" or, by default, the first that works here.
    Raises GrpoError where none does. Close it, or use `with`.
    """

    def __init__(self, mechanism: str | None = None):
        self._lock = threading.Lock()
        self._server: _Server | None = None
        names = [mechanism] if mechanism else list(mechanisms.MECHANISMS)
        faults = []
        for self.mechanism in names:
            try:
                found = self.run(PROBE)
            except (OSError, ValueError, SandboxFailed) as fault:
                faults.append(f"{self.mechanism}: {fault}")
                self.close()
                continue
            if found.status == "ok" and found.stdout == "confined\n":
                return
            faults.append(f"{self.mechanism}: {found.stderr.strip()[-300:]}")
            self.close()
        self.close()
        raise GrpoError(
            "sandbox: this machine has no way to confine a program; "
            f"`apt-get install bubblewrap` ({'; '.join(faults)})"
        )

    def run(
        self,
        program: str,
        *,
        wall_seconds: float = 10.0,
        cpu_seconds: float = 10.0,
        memory_bytes: int = 1 << 30,
        output_bytes: int = 1 << 16,
    ) -> Result:
        """Runs one program; SandboxFailed if that could not be done, twice.

        `cpu_seconds` is rounded up to whole ones. `memory_bytes` is of address space,
        of which Python, numpy and sympy have taken 150 MB.
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
            server = self._running()
            try:
                reply = server.ask({"program": program, **limits}, wall_seconds)
            except (OSError, ValueError) as error:
                server.close()
                fault = f"{type(error).__name__} {server.fault}"
                continue
            if "failed" not in reply:
                return Result(**reply)
            fault = reply["failed"]
        raise SandboxFailed(f"sandbox: a program could not be run: {fault.strip()}")

    def run_many(
        self, programs: Sequence[str], *, workers: int = WORKERS, **limits
    ) -> list[Result]:
        """`run` for each, `workers` at a time; results in the programs' order."""
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(functools.partial(self.run, **limits), programs))

    def close(self) -> None:
        """Ends the server; the next `run` starts another."""
        with self._lock:
            if self._server is not None:
                self._server.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _running(self) -> "_Server":
        with self._lock:
            if self._server is None or self._server.process.poll() is not None:
                self._server = _Server(self.mechanism)
            return self._server


class _Server:
    """The process of `server.py`, and the socket on which it takes connections."""

    def __init__(self, mechanism: str):
        self.control, inner = socket.socketpair()
        self.errors: IO[bytes] = tempfile.TemporaryFile()
        self.fault = ""  # the last line that the process wrote there, once closed
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
        try:
            ready = self.control.recv(16) == b"ready"
        except OSError:
            ready = False
        if not ready:
            self.close()
            raise GrpoError(self.fault or "its server did not start")

    def ask(self, request: dict, wall_seconds: float) -> dict:
        """A request's reply; OSError or ValueError if none came."""
        here, there = socket.socketpair()
        with here:
            with there:
                socket.send_fds(self.control, [b"+"], [there.fileno()])
            here.settimeout(wall_seconds + GRACE_SECONDS)
            here.sendall(json.dumps(request).encode() + b"\n")
            with here.makefile("rb") as reply:
                return json.loads(reply.readline())

    def close(self) -> None:
        """Lets the server end, which it does when nobody holds the socket."""
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ValueError):  # another thread was faster
            said = os.pread(self.errors.fileno(), 1 << 16, 0).decode(errors="replace")
            self.fault = said.strip().rpartition("\n")[2]
            self.errors.close()


_shared: tuple[int, Sandbox] | None = None
_shared_lock = threading.Lock()


def shared() -> Sandbox:
    """This process's sandbox, started with the first program (a fork gets its own)."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared[0] != os.getpid():
            _shared = os.getpid(), Sandbox()
            atexit.register(_close, os.getpid())
        return _shared[1]


def _close(owner: int) -> None:
    if _shared is not None and os.getpid() == owner == _shared[0]:
        with contextlib.suppress(OSError):
            _shared[1].close()


def run(program: str, **limits) -> Result:
    """`Sandbox.run` in this process's own sandbox.

    >>> run("import sympy; print(sympy.sqrt(8))").stdout
    '2*sqrt(2)\\n'
    """
    return shared().run(program, **limits)


def run_many(programs: Sequence[str], **limits) -> list[Result]:
    """`Sandbox.run_many` in this process's own sandbox.

    >>> [found.status for found in run_many(["print(1)", "1 / 0", "exit(0)"])]
    ['ok', 'error', 'ok']
    """
    return shared().run_many(programs, **limits)
