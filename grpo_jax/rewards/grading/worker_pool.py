r"""Grades answers in worker processes that can be killed.

`grade` returns a bool for each pair of prediction and reference. Rational answers are
compared in the calling process. Other pairs go to worker processes, one per line of
JSON. `python -c` starts them, so they are no forks of the trainer and do not import its
`__main__`.

The limit for a pair is CPU time, so a busy machine does not make a right answer wrong.
The limit by the clock is `PATIENCE` times as long. A worker above a limit is killed and
replaced, and its pair counts as not equal. If something else killed the worker, the
pair is tried again. Workers start when a pair needs one. They end when the pool closes
or the parent has gone.
"""

import atexit
import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_jax.errors import GrpoError
from grpo_jax.rewards.grading import equality
from grpo_jax.rewards.grading.paper import RULES
from grpo_jax.rewards.grading.worker import PATIENCE, readable

SECONDS = 3.0  # of CPU per pair; with the start of a new worker it stays below 5
START_SECONDS = 120.0
WORKERS = max(1, min(8, (os.cpu_count() or 2) // 2))


class _Worker:
    """A worker process and its two pipes."""

    def __init__(self):
        root = str(Path(__file__).resolve().parents[3])
        code = (
            f"import sys; sys.path.insert(0, {root!r}); "
            "from grpo_jax.rewards.grading.worker import work; "
            f"work({os.getpid()})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            bufsize=0,
        )
        self.ready = False

    def ask(
        self, prediction: str, reference: str, rule: str, seconds: float
    ) -> bool | None:
        """Returns the answer; None if the worker ran out of time and was killed.

        Raises:
          _Died: the worker was killed or crashed before it answered.
          GrpoError: the worker did not start.
        """
        try:
            if not self.ready:
                hello = self._line(START_SECONDS)
                if hello != b"ready":
                    raise GrpoError(
                        "grading: a worker process did not start"
                        f"{': ' + hello.decode(errors='replace') if hello else ''}; try"
                        " `python -c 'import math_verify'`"
                    )
                self.ready = True
            task = json.dumps([prediction, reference, rule, seconds])
            assert self.process.stdin
            self.process.stdin.write(task.encode() + b"\n")
            reply = self._line(seconds)
        except OSError:
            reply = b""
        except BaseException:
            self.close()
            raise
        if reply in (b"1", b"0"):
            return reply == b"1"
        self.close()
        if reply is None:
            return None
        raise _Died

    def _line(self, seconds: float) -> bytes | None:
        """Returns the worker's reply; None after a timeout, b"" if it is dead."""
        assert self.process.stdout
        pipe, line = self.process.stdout.fileno(), b""
        began, used = time.monotonic(), _cpu_seconds(self.process.pid)
        last = began + PATIENCE * seconds
        until = began + seconds
        while not line.endswith(b"\n"):
            if not readable(pipe, max(0.01, until - time.monotonic())):
                left = seconds - (_cpu_seconds(self.process.pid) - used)
                until = min(last, time.monotonic() + left)
                if used < 0 or left <= 0 or time.monotonic() >= last:
                    return None
                continue
            part = os.read(pipe, 4096)
            if not part:
                return b""
            line += part
        return line.strip()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


class _Died(Exception):
    """A worker ended without an answer, and not because its time was over."""


def _cpu_seconds(process: int) -> float:
    """Returns the CPU seconds of a process; -1 if the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Pool:
    """A thread-safe pool of worker processes, each of which takes one pair at a time.

    Args:
      workers: the largest number of processes.
      seconds: the limit of CPU time for a pair.

    Attributes:
      timeouts: the number of pairs that counted as not equal for lack of an answer.
    """

    def __init__(self, workers: int = WORKERS, seconds: float = SECONDS):
        self.workers, self.seconds, self.owner = workers, seconds, os.getpid()
        self.timeouts = 0
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        for _ in range(workers):
            self._idle.put(None)  # a slot in which a worker may start

    def same(self, prediction: str, reference: str, rule: str = "strict") -> bool:
        """Returns whether a worker finds a pair equal; False if it takes too long.

        If a worker dies, another one is asked, since something else may have killed it.
        """
        for _ in range(2):
            with contextlib.suppress(_Died):
                return self._same(prediction, reference, rule)
        with self._lock:
            self.timeouts += 1
        return False

    def _same(self, prediction: str, reference: str, rule: str) -> bool:
        worker = self._idle.get()
        try:
            if worker is None or worker.process.poll() is not None:
                self._forget(worker)
                worker = self._start()
            answer = worker.ask(prediction, reference, rule, self.seconds)
            if answer is None:
                with self._lock:
                    self.timeouts += 1
            return bool(answer)
        finally:
            if worker is not None and worker.process.returncode is not None:
                # Start the replacement now, so that the next pair need not wait.
                worker = self._start() if self._forget(worker) else None
            self._idle.put(worker)

    def _start(self) -> _Worker:
        worker = _Worker()
        with self._lock:
            self._all.add(worker)
        return worker

    def _forget(self, worker: _Worker | None) -> bool:
        """Ends a worker; returns False if `close` had already ended it."""
        if worker is None:
            return False
        worker.close()
        with self._lock:
            known = worker in self._all
            self._all.discard(worker)
        return known

    def close(self) -> None:
        """Ends all workers; a later pair starts new ones."""
        if os.getpid() != self.owner:  # the workers belong to the parent of this fork
            return
        with self._lock:
            workers, self._all = self._all, set()
        for worker in workers:
            worker.close()


_pool: Pool | None = None
_pool_lock = threading.Lock()


def pool() -> Pool:
    """Returns the pool of this process; a forked child gets its own."""
    global _pool
    with _pool_lock:
        if _pool is None or _pool.owner != os.getpid():
            _pool = Pool()
            atexit.register(_pool.close)
        return _pool


@functools.lru_cache(maxsize=65536)
def _same(prediction: str, reference: str, rule: str) -> bool:
    try:
        return RULES[rule](prediction, reference, equality.Exact())
    except equality.Undecided:
        return pool().same(prediction, reference, rule)


def grade(
    predictions: Sequence[str | None], references: Sequence[str], rule: str = "strict"
) -> list[bool]:
    r"""Returns whether each prediction equals its reference answer.

    Args:
      predictions: the answers; None counts as wrong.
      references: the reference answers, as many as predictions.
      rule: "strict", or "paper", the lenient rule of DeepSeekMath. Use "paper" only
        for comparison with published figures.

    Raises:
      GrpoError: the lengths differ, or a worker process does not start.

    >>> grade(["0.5", None, "3"], [r"\frac{1}{2}", "1", "4"])
    [True, False, False]
    """
    if len(predictions) != len(references):
        raise GrpoError(
            f"grade: {len(predictions)} predictions for {len(references)} references"
        )
    results: list[bool] = [False] * len(references)
    hard: dict[tuple[str, str], list[int]] = {}
    exact = equality.Exact()
    for n, (prediction, reference) in enumerate(
        zip(predictions, references, strict=True)
    ):
        if prediction is None:
            continue
        try:
            results[n] = RULES[rule](prediction, reference, exact)
        except equality.Undecided:
            hard.setdefault((prediction, reference), []).append(n)
    if len(hard) == 1:
        decided = [_same(*next(iter(hard)), rule)]
    elif hard:
        with ThreadPoolExecutor(min(len(hard), pool().workers)) as threads:
            decided = list(threads.map(lambda pair: _same(*pair, rule), hard))
    else:
        decided = []
    for places, answer in zip(hard.values(), decided, strict=True):
        for n in places:
            results[n] = answer
    return results
