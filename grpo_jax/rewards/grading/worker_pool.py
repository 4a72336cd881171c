r"""Grades answers in worker processes that can be killed.

`grade_answers` returns a bool for each pair of prediction and reference. Rational
answers are compared in the calling process. Other pairs go to worker processes, one per
line of JSON. `python -c` starts them, so they are no forks of the trainer and do not
import its `__main__`.

The limit for a pair is CPU time, so a busy machine does not make a right answer wrong.
The limit by the clock is `PATIENCE` times as long. A worker above a limit is killed,
and its pair counts as not equal. If something else killed the worker, the pair is tried
again. Workers start when a pair needs one. They end when the pool closes or the parent
has gone.
"""

import atexit
import functools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_jax.errors import GrpoError
from grpo_jax.rewards.grading import equality
from grpo_jax.rewards.grading.paper import RULES
from grpo_jax.rewards.grading.worker import PATIENCE

SECONDS = 3.0  # of CPU per pair; with the start of a new worker it stays below 5
START_SECONDS = 600.0  # by the clock, for a busy machine
WORKERS = max(1, min(8, (os.cpu_count() or 2) // 2))


class _Worker:
    """A worker process, started by the first pair and again after its death."""

    def __init__(self):
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, task: list, seconds: float) -> bool | None:
        """Returns the answer, False after a timeout, None if the worker died.

        Args:
          task: the prediction, the reference and the rule.
          seconds: the limit of CPU time.

        Raises:
          GrpoError: the worker did not start.
        """
        try:
            process = self._running()
            assert process.stdin
            process.stdin.write(json.dumps([*task, seconds]).encode() + b"\n")
            reply = _line(process, PATIENCE * seconds)
        except BrokenPipeError:
            return None
        except BaseException:
            self.close()
            raise
        if reply not in (b"1\n", b"0\n"):
            self.close()
            late = process.returncode in (-signal.SIGPROF, -signal.SIGALRM)
            return False if late or reply is None else None
        return reply == b"1\n"

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.close()
        root = str(Path(__file__).resolve().parents[3])
        code = (
            f"import sys; sys.path.insert(0, {root!r}); "
            "from grpo_jax.rewards.grading.worker import run_worker; "
            f"run_worker({os.getpid()})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            bufsize=0,
        )
        hello = _line(self.process, START_SECONDS) or b""
        if hello != b"ready\n":
            reason = hello.decode(errors="replace").strip()
            raise GrpoError(
                f"grading: a worker process did not start{': ' * bool(reason)}{reason};"
                " try `python -c 'import math_verify'`"
            )
        return self.process

    def close(self) -> None:
        """Kills the process, if there is one, and closes its pipes."""
        if self.process is not None:
            self.process.kill()
            with self.process:
                pass


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """Returns a line that a process wrote; None after a timeout, b"" if it is dead."""
    assert process.stdout
    poller = select.poll()  # select() refuses descriptors above 1023
    poller.register(process.stdout, select.POLLIN)
    return process.stdout.readline() if poller.poll(seconds * 1000) else None


class WorkerPool:
    """A thread-safe pool of worker processes, each of which takes one pair at a time.

    Args:
      workers: the largest number of processes.
      seconds: the limit of CPU time for a pair.
    """

    def __init__(self, workers: int = WORKERS, seconds: float = SECONDS):
        self.seconds = seconds
        self._workers = [_Worker() for _ in range(workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def is_equal(self, prediction: str, reference: str, rule: str = "strict") -> bool:
        """Returns whether a worker finds a pair equal; False if it takes too long.

        If the worker dies, a new one is asked, since something else may have killed it.

        Raises:
          GrpoError: a worker process does not start.
        """
        task, worker = [prediction, reference, rule], self._idle.get()
        try:
            answer = worker.ask(task, self.seconds)
            return bool(worker.ask(task, self.seconds) if answer is None else answer)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends all workers; a later pair starts new ones."""
        for worker in self._workers:
            worker.close()


def shared_pool() -> WorkerPool:
    """Returns the pool of this process; a forked child gets its own."""
    with _pool_lock:
        return _pool_of(os.getpid())


_pool_lock = threading.Lock()


@functools.cache
def _pool_of(process: int) -> WorkerPool:
    pool = WorkerPool()
    # In a fork, the workers still belong to the parent.
    atexit.register(lambda: process == os.getpid() and pool.close())
    return pool


@functools.lru_cache(maxsize=65536)
def _ask_worker(prediction: str, reference: str, rule: str) -> bool:
    return shared_pool().is_equal(prediction, reference, rule)


def grade_answers(
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

    >>> grade_answers(["0.5", None, "3"], [r"\frac{1}{2}", "1", "4"])
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
    with ThreadPoolExecutor(min(max(1, len(hard)), WORKERS)) as threads:
        decided = threads.map(lambda pair: _ask_worker(*pair, rule), hard)
        for places, answer in zip(hard.values(), decided, strict=True):
            for n in places:
                results[n] = answer
    return results
