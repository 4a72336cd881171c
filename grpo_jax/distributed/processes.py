"""Several processes as one run: starting them, what they tell each other, their end.

In: flags, or what a cluster says of itself (TPU pods, SLURM, Kubernetes, Open MPI, as
jax detects them). Out: jax.distributed, and a few functions that a loop needs so that
it can be written for one process and be right for many. With one they cost nothing.

Every process runs the same program on the same numbers: the questions of a step, its
outputs as token ids, its rewards. What is slow on a host is divided: each decodes and
grades the outputs that are its own (`share`), and all get the results (`exchange`).
Process 0 alone writes. An error in one process ends all, with its line.

What processes tell each other goes through jax's coordinator and not the devices: it
waits for no program, and may be a text.
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

from grpo_jax.distributed.rendezvous import meet
from grpo_jax.errors import GrpoError

T = TypeVar("T")
R = TypeVar("R")
_FAILED = "grpo_jax/failed"
_turns, _polls = itertools.count(), itertools.count()
_stop = False
_leaving = threading.Lock()


def _state() -> Any:
    # jax has no public name for the key-value store that its processes share.
    from jax._src import distributed

    return distributed.global_state


def count() -> int:
    return _state().num_processes


def index() -> int:
    return _state().process_id


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return index() == 0


def say(text: str) -> None:
    """A line for the reader, once a run."""
    if first():
        print(text, flush=True)


def share(items: int, group: int = 1) -> slice:
    """Which of so many items are this process's own; groups are kept whole if possible.

    >>> share(10)
    slice(0, 10, None)
    """
    return part(items, group, index(), count())


def part(items: int, group: int, number: int, of: int) -> slice:
    """Share `number` of `of`; they differ by an item (or a group) at most.

    >>> [part(12, 4, i, 2) for i in (0, 1)], [part(4, 4, i, 2) for i in (0, 1)]
    ([slice(0, 4, None), slice(4, 12, None)], [slice(0, 2, None), slice(2, 4, None)])
    """
    if items % group or items // group < of:
        group = 1
    start, stop = (items // group * (number + i) // of * group for i in (0, 1))
    return slice(start, stop)


def exchange(value: T) -> list[T]:
    """What every process gives here, by its number; values of JSON.

    All processes must come here, in the same order.

    >>> exchange({"reward": 0.5})
    [{'reward': 0.5}]
    """
    client = _state().client
    if client is None:
        return [value]
    turn = next(_turns)
    client.key_value_set(f"grpo_jax/{turn}/{index()}", json.dumps(value))
    found = [json.loads(_get(f"grpo_jax/{turn}/{i}")) for i in range(count())]
    if turn:  # who is here has read what was told before
        client.key_value_delete(f"grpo_jax/{turn - 1}/{index()}")
    return found


def _get(key: str) -> str:
    """A value, waited for as long as every process lives."""
    while True:
        try:
            return _state().client.blocking_key_value_get(key, 2000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def from_first(make: Callable[[], T]) -> T:
    """What process 0 makes of files that all can see, for all: JSON."""
    told: list[Any] = exchange(make() if first() else None)
    return told[0]


def divide(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """work(items), a result an item, of which each process does its share.

    >>> divide(lambda texts: [len(t) for t in texts], ["a", "bcd"])
    [1, 3]
    """
    mine = items[share(len(items))]
    parts = exchange(list(work(mine)) if mine else [])
    return [result for part in parts for result in part]


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Refuse where a process has other values than process 0, by their hashes."""
    if _state().client is None:
        return
    texts = {name: repr(value).encode() for name, value in values.items()}
    told = exchange({name: hashlib.sha256(t).hexdigest() for name, t in texts.items()})
    for number, other in enumerate(told):
        names = [n for n in told[0] | other if told[0].get(n) != other.get(n)]
        if names:
            raise GrpoError(
                f"{what}: process {number} has not what process 0 has "
                f"({', '.join(names[:6])}{', …' * (len(names) > 6)}); start all "
                "processes with the same command, files and versions"
            )


def stopping() -> bool:
    """Whether some process was told to stop (SIGTERM): all hear it at the same call.

    Ask at every step of whatever takes long, in all processes alike. One process alone
    never hears it here: its signal is its own.
    """
    global _stop
    if _state().client is not None and not _stop:
        listen()
        _stop = _state().preemption_sync_manager.reached(next(_polls))
    return _stop


class _OwnCounter:
    """jax's preemption manager, which only `stopping` asks whether to stop.

    On SIGTERM the manager has all processes stop at the call whose number is one above
    the highest that any has come to. This holds while the numbers grow: Orbax would ask
    with its own, the training steps, and set a call that is already past.
    """

    def __init__(self, manager: Any):
        self.reached = manager.reached_sync_point
        self.shutdown = manager.shutdown

    def reached_sync_point(self, number: int) -> bool:
        """What others hear: `Checkpoints` tells Orbax when to save."""
        return False


def listen() -> None:
    """Makes `stopping` the only one that asks jax whether to stop."""
    state = _state()
    if not isinstance(state.preemption_sync_manager, _OwnCounter):
        state.preemption_sync_manager = _OwnCounter(state.preemption_sync_manager)


@contextlib.contextmanager
def together(
    coordinator: str | None = None,
    processes: int | None = None,
    number: int | None = None,
    *,
    wait: int = 300,
    heartbeat: int = 100,
) -> Iterator[None]:
    """All processes of a run, from their start to their common end.

    Args:
      coordinator, processes, number: host:port of process 0, how many there are and
        which this is; None: as the cluster says, and where there is none this process
        is alone.
      wait: seconds for all to come (fault 41).
      heartbeat: seconds after which a process that is silent counts as lost; jax then
        aborts the others (fault 40).

    Raises:
      GrpoError: a part of the address is missing or out of range.
    """
    if not _start(coordinator, processes, number, wait, heartbeat):
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done,), daemon=True)
    watch.start()
    try:
        yield
    except SystemExit as error:
        if error.code:
            _end(str(error.code).strip())
    except BaseException as error:
        traceback.print_exc()
        _end(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    done.set()
    watch.join()
    jax.distributed.shutdown()


def _start(coordinator, processes, number, wait: int, heartbeat: int) -> bool:
    """Starts jax.distributed; False where this process is alone."""
    given = [coordinator, processes, number]
    if given != [None] * 3:
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
        own = coordinator if local else f"[::]:{coordinator.rpartition(':')[2]}"
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", own)
        meet(coordinator, processes, number, bind=bind, wait=wait)
    late = threading.Timer(wait, _nobody_came, (wait,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            number,
            initialization_timeout=wait + 60,  # jax's own end is an abort
            heartbeat_timeout_seconds=heartbeat,
            coordinator_bind_address=bind,
            # Told everything, jax has nothing to look up, and takes all local devices.
            cluster_detection_method="deactivate" if coordinator else None,
        )
    except ValueError as error:
        if given == [None] * 3 and "coordinator_address" in str(error):
            return False  # jax knows of no cluster here
        raise GrpoError(f"processes: {error}") from None
    except RuntimeError as error:
        if given == [None] * 3 and "before any JAX" in str(error):
            return False  # part of a program that computes already
        line = (str(error).splitlines() or [""])[0]
        raise GrpoError(f"processes: they could not be started ({line})") from error
    finally:
        late.cancel()
    return True


def _nobody_came(seconds: int) -> None:
    print(
        f"error: not all processes came within {seconds} s (--wait); look at the "
        "others' logs, and at --coordinator, --num_processes and --process_id",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _failure() -> str | None:
    """The line of the process that failed first, if one did."""
    try:
        return _state().client.key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError:
        return None


def _watch(done: threading.Event) -> None:
    """Ends this process when another has failed: it may be waiting for that one."""
    while not done.wait(1.0):
        if line := _failure():
            _leave(line)


def _end(line: str) -> None:
    """This process fails: the others are told, unless its failure is theirs."""
    if "JaxRuntimeError" in line:  # what the end of another looks like from here
        time.sleep(2.5)
    first_line = _failure()
    if first_line is None:
        line = f"process {index()} of {count()}: {line}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _state().client.key_value_set(_FAILED, line)
    _leave(first_line or line)


def _leave(line: str) -> None:
    if not _leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is about to end this process
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if first():
        time.sleep(3)  # the others ask process 0
    os._exit(1)
