"""A grading worker: a process that compares answers with computer algebra.

`worker_pool` starts it and sends it one pair per line of JSON. The kernel kills it if a
pair takes too long. It never executes text. An audit hook refuses to start programs,
open sockets or write files.
"""

import json
import os
import signal
import sys
import threading
import time

MEMORY = 2 << 30  # bytes of address space a worker may use
PATIENCE = 5  # wall-clock limit as a multiple of the CPU limit, for a busy machine


def run_worker(parent: int) -> None:
    """Reads pairs from stdin and writes `1` or `0` for each.

    Returns when the pipe closes or the parent has gone.

    Args:
      parent: the process id of the parent.
    """
    import resource

    # The parent handles Ctrl-C and a SIGTERM to all processes of a run.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints goes to stderr
    try:
        import math_verify  # noqa: F401  (imported before a pair's time starts)

        from grpo_jax.rewards.grading.algebra import compare_in_worker
    except ImportError as error:
        os.write(replies, f"{error}\n".encode())
        return
    compare_in_worker("x+1", "1+x")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)
    os.write(replies, b"ready\n")
    threading.Thread(target=_end_after, args=[parent], daemon=True).start()
    for line in sys.stdin.buffer:
        prediction, reference, rule, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds + 1)
        try:
            answer = compare_in_worker(prediction, reference, rule)
        except Exception:
            answer = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, b"1\n" if answer else b"0\n")


def _end_after(parent: int) -> None:
    """Ends this process after its parent; a fork of it may keep the pipe open."""
    while os.getppid() == parent:
        time.sleep(5)
    os._exit(0)


def _refuse(event: str, args: tuple) -> None:
    """Raises PermissionError for programs, sockets and writing to files."""
    if event.startswith(("subprocess.", "os.system", "os.exec", "os.posix_spawn",
                         "os.fork", "os.spawn", "socket.", "os.remove", "os.rename",
                         "shutil.", "ctypes.")):  # fmt: skip
        raise PermissionError(f"grading worker: {event}")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        raise PermissionError(f"grading worker: {event}")
