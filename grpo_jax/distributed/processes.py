"""Starts, coordinates and ends the processes of a run.

Processes are found by flags, or on a cluster that jax detects (TPU pods, SLURM,
Kubernetes, Open MPI). The functions here let a training loop be written for one process
and be right for many; with one process they cost nothing.

Every process runs the same program on the same data: a step's questions, outputs and
rewards. Slow host work is divided: each process decodes and grades its share of the
outputs (`share_of_process`), and all get the results (`all_gather`). Only process 0
writes files. An error in one process ends all of them, with its message.

Messages go through jax's coordinator and not through the devices. They may be text, and
do not wait for a running program.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from grpo_jax.distributed.rendezvous import wait_for_processes
from grpo_jax.errors import GrpoError

T = TypeVar("T")
R = TypeVar("R")
_FAILED = "grpo_jax/failed"
_turns, _polls = itertools.count(), itertools.count()
_preempted = False
_exiting = threading.Lock()


def _state() -> Any:
    # jax has no public name for the key-value store that its processes share.
    from jax._src import distributed

    return distributed.global_state


def process_count() -> int:
    """Returns the number of processes."""
    return _state().num_processes


def process_index() -> int:
    """Returns the number of this process, from 0."""
    return _state().process_id


def is_first_process() -> bool:
    """Returns whether this is process 0, which writes and prints."""
    return process_index() == 0


def print_once(text: str) -> None:
    """Prints a line, on process 0 only."""
    if is_first_process():
        print(text, flush=True)


def share_of_process(items: int, group: int = 1) -> slice:
    """Returns the slice of `items` items that is this process's share.

    Groups of `group` consecutive items are kept whole if every process gets one.

    >>> share_of_process(10)
    slice(0, 10, None)
    """
    return share_of(items, group, process_index(), process_count())


def share_of(items: int, group: int, number: int, of: int) -> slice:
    """Returns share `number` of `of` as a slice.

    Shares differ by at most one item, or by one group. Groups of `group` consecutive
    items are kept whole if there are at least `of` groups.

    >>> [share_of(12, 4, i, 2) for i in (0, 1)], [share_of(4, 4, i, 2) for i in (0, 1)]
    ([slice(0, 4, None), slice(4, 12, None)], [slice(0, 2, None), slice(2, 4, None)])
    """
    if items % group or items // group < of:
        group = 1
    start, stop = (items // group * (number + i) // of * group for i in (0, 1))
    return slice(start, stop)


def all_gather(value: T) -> list[T]:
    """Returns the values of all processes, in the order of their numbers.

    All processes must call it, in the same order. Values are those of JSON.

    >>> all_gather({"reward": 0.5})
    [{'reward': 0.5}]
    """
    client = _state().client
    if client is None:
        return [value]
    turn = next(_turns)
    client.key_value_set(f"grpo_jax/{turn}/{process_index()}", json.dumps(value))
    found = [
        json.loads(_wait_for_value(f"grpo_jax/{turn}/{i}"))
        for i in range(process_count())
    ]
    if turn:  # all have read the turn before
        client.key_value_delete(f"grpo_jax/{turn - 1}/{process_index()}")
    return found


def _wait_for_value(key: str) -> str:
    """Waits for a value, for as long as every process lives."""
    while True:
        try:
            return _state().client.blocking_key_value_get(key, 2000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def broadcast(make: Callable[[], T]) -> T:
    """Calls `make` on process 0 and returns its result (JSON) on all processes."""
    values: list[Any] = all_gather(make() if is_first_process() else None)
    return values[0]


def map_divided(
    work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]
) -> list[R]:
    """Returns work(items), of which each process computes its share.

    Args:
      work: returns one result (JSON) for each of the items that it is given.
      items: the items, the same on all processes.

    >>> map_divided(lambda texts: [len(t) for t in texts], ["a", "bcd"])
    [1, 3]
    """
    mine = items[share_of_process(len(items))]
    parts = all_gather(list(work(mine)) if mine else [])
    return [result for part in parts for result in part]


def check_equal(what: str, values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same values, by the hashes of their reprs.

    Args:
      what: what the values are, for the message.
      values: the values by name.

    Raises:
      GrpoError: a process has other values than process 0.
    """
    if _state().client is None:
        return
    texts = {name: repr(value).encode() for name, value in values.items()}
    mine = {name: hashlib.sha256(t).hexdigest() for name, t in texts.items()}
    first, *_ = hashes = all_gather(mine)
    for number, other in enumerate(hashes):
        names = [n for n in first | other if first.get(n) != other.get(n)]
        if names:
            raise GrpoError(
                f"{what}: process {number} has not what process 0 has "
                f"({', '.join(names[:6])}{', …' * (len(names) > 6)}); start all "
                "processes with the same command, files and versions"
            )


def is_preempted() -> bool:
    """Returns whether a process was sent SIGTERM; all learn it at the same call.

    Call it at every step of long work, on all processes. In a run of one process it
    always returns False; that process handles the signal itself.
    """
    global _preempted
    if _state().client is not None and not _preempted:
        claim_preemption_manager()
        _preempted = _state().preemption_sync_manager.reached(next(_polls))
    return _preempted


class _PreemptionManager:
    """Wraps jax's preemption manager, so that only `is_preempted` can ask it.

    On SIGTERM the manager lets all processes stop at a call whose number is one above
    the highest that any process has reached. The numbers must therefore only grow.
    Orbax would ask with its own numbers, the training steps, and the chosen call could
    already be past.
    """

    def __init__(self, manager: Any):
        self.reached = manager.reached_sync_point
        self.shutdown = manager.shutdown

    def reached_sync_point(self, number: int) -> bool:
        """Returns False: Orbax saves when `CheckpointDirectory` tells it to."""
        return False


def claim_preemption_manager() -> None:
    """Makes `is_preempted` the only caller of jax's preemption manager."""
    state = _state()
    if not isinstance(state.preemption_sync_manager, _PreemptionManager):
        state.preemption_sync_manager = _PreemptionManager(
            state.preemption_sync_manager
        )


@contextlib.contextmanager
def connect_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    number: int | None = None,
    *,
    wait: int = 300,
    heartbeat: int = 100,
) -> Iterator[None]:
    """Connects the processes of a run for the length of a `with` block.

    If the block fails in one process, all processes end with its message.

    Args:
      coordinator: host:port of process 0; None if the cluster tells it. Without a
        cluster this process is then alone.
      processes: how many processes there are, or None.
      number: the number of this process, from 0, or None.
      wait: seconds to wait until all processes are there; the run ends if one is not.
      heartbeat: seconds after which a silent process counts as lost. jax then aborts
        the others, which would otherwise wait for it without end.

    Raises:
      GrpoError: a part of the address is missing or out of range, or the processes do
        not find each other.
    """
    if not _initialize_jax(coordinator, processes, number, wait, heartbeat):
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch_for_failures, args=(done,), daemon=True)
    watch.start()
    try:
        yield
    except SystemExit as error:
        if error.code:
            _fail(str(error.code).strip())
    except BaseException as error:
        _fail(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", error)
    done.set()
    watch.join()
    jax.distributed.shutdown()


def _initialize_jax(coordinator, processes, number, wait: int, heartbeat: int) -> bool:
    """Starts jax.distributed; returns False if this process is alone."""
    given = [coordinator, processes, number]
    without_flags = given == [None] * 3
    if not without_flags:
        if None in given:
            raise GrpoError(
                "--coordinator, --num_processes and --process_id go together; give all "
                "three, or none on a cluster that jax knows"
            )
        if ":" not in coordinator or not 0 <= number < processes:
            raise GrpoError(
                f"--coordinator {coordinator} --num_processes {processes} --process_id "
                f"{number}: host:port, and a number from 0 to {processes - 1}, please"
            )
    bind = None
    if coordinator:
        local = coordinator.startswith(("127.0.0.1:", "localhost:"))
        default = coordinator if local else f"[::]:{coordinator.rpartition(':')[2]}"
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", default)
        wait_for_processes(coordinator, processes, number, bind=bind, wait=wait)
    late = threading.Timer(wait, _give_up_waiting, (wait,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            number,
            initialization_timeout=wait + 60,  # after our own: jax would abort
            heartbeat_timeout_seconds=heartbeat,
            coordinator_bind_address=bind,
            # With all flags given, jax need not detect a cluster, and each process
            # takes all its local devices.
            cluster_detection_method="deactivate" if coordinator else None,
        )
    except ValueError as error:
        if without_flags and "coordinator_address" in str(error):
            return False  # jax knows of no cluster here
        raise GrpoError(f"processes: {error}") from None
    except RuntimeError as error:
        if without_flags and "before any JAX" in str(error):
            return False  # called by a program that uses jax already
        line = (str(error).splitlines() or [""])[0]
        raise GrpoError(f"processes: they could not be started ({line})") from error
    finally:
        late.cancel()
    return True


def _give_up_waiting(seconds: int) -> None:
    print(
        f"error: not all processes came within {seconds} s (--wait); look at the "
        "others' logs, and at --coordinator, --num_processes and --process_id",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _first_failure() -> str | None:
    """Returns the message of the process that failed first, if one did."""
    try:
        return _state().client.key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError:
        return None


def _watch_for_failures(done: threading.Event) -> None:
    """Ends this process when another has failed, as it may be waiting for it."""
    while not done.wait(1.0):
        if line := _first_failure():
            _exit(line)


def _fail(line: str, error: BaseException | None = None) -> None:
    """Ends this process, and tells the others unless one of them failed first.

    An error's traceback is printed only where it came first: others follow from it.
    """
    if "JaxRuntimeError" in line:  # the usual sign that another process ended
        time.sleep(2.5)
    first_line = _first_failure()
    if first_line is None:
        if error is not None:
            traceback.print_exception(error)
        line = f"process {process_index()} of {process_count()}: {line}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _state().client.key_value_set(_FAILED, line)
    _exit(first_line or line)


def _exit(line: str) -> None:
    if not _exiting.acquire(blocking=False):
        time.sleep(60)  # another thread is about to end this process
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if is_first_process():
        time.sleep(3)  # the others still ask process 0 for the message
    os._exit(1)
