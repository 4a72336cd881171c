"""Checkpoints: state in, state out, nothing lost.

In: a pytree of jax arrays (typed PRNG keys too), on one device or over the mesh of
many processes, and a JSON dictionary. Out: one folder a step, written by Orbax while
training goes on, with a checksum a leaf; the same state again, or one line why not.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from grpo_jax.checkpoints.checksums import and_more, describe, flatten, kind
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError

_LOGGERS = (None, "absl", "asyncio")  # through which Orbax tells of failures


@contextlib.contextmanager
def lock(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes `workdir` and holds it for this run, so that no second run writes there.

    The lock goes with the process, however it ends. With several processes, call it
    after `jax.distributed.initialize`: process 0 holds the lock for all.

    Raises `GrpoError` when another process holds it, or when it is not writable.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, lock(folder + "/run") as workdir:
    ...     workdir.name
    'run'
    """
    workdir = Path(workdir)
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        yield workdir
        return

    def closed(error: OSError) -> GrpoError:
        why = f"cannot be written ({error.strerror})"
        return GrpoError(f"workdir {workdir}: {why}; choose another")

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(workdir / ".lock", "ab+", buffering=0)
        with tempfile.TemporaryFile(dir=workdir):
            pass  # the lock may be an old one, in a folder that takes no other file
    except OSError as error:
        raise closed(error) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = (handle.read() or b"unknown").decode(errors="replace")
            raise GrpoError(
                f"workdir {workdir}: in use by process {holder} ({error.strerror}); "
                "wait for it, stop it, or choose another"
            ) from None
        try:
            handle.truncate(0)
            handle.write(str(os.getpid()).encode())
        except OSError as error:
            raise closed(error) from None
        yield workdir


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _first_line(error: BaseException) -> str:
    """What went wrong at the bottom of a chain of exceptions, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [""])[0].split(" [tensorstore_spec")[0]
    ends = f"{text[:120]} … {text[-170:]}"  # the cause stands at either
    return f"{type(error).__name__}: {ends if len(text) > 300 else text}"


class Checkpoints:
    """A directory of checkpoints, one folder a step; use it in a `with` statement.

    Leaving the block finishes a pending save, also after an exception or `sys.exit`.
    Every process of a run makes the same calls in the same order.

    Args:
        directory: made when missing.
        every: `save` writes at the steps that this divides.
        keep: how many checkpoints stay, the newest ones.
        clean: remove what a killed run left half-written; not where one may be live.
        objection: of a checkpoint's metadata, why it is not to be restored, or "".

    >>> import tempfile
    >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Checkpoints(folder, every=2) as checkpoints:
    ...         saved = checkpoints.save(2, state, {"loss": 0.5})
    ...     with Checkpoints(folder, every=2) as checkpoints:
    ...         step, state, metadata = checkpoints.restore(state)
    >>> saved, step, state["w"].tolist(), metadata
    (True, 2, [0.0, 1.0, 2.0], {'loss': 0.5})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int,
        keep: int = 2,
        clean: bool = True,
        objection: Callable[[dict[str, Any]], str] = lambda metadata: "",
    ):
        if min(every, keep) < 1:
            raise GrpoError(f"checkpoints: every={every} or keep={keep} is below 1")
        local = "://" not in str(directory)
        self._directory = os.path.abspath(directory) if local else str(directory)
        self._every, self._keep, self._clean = every, keep, clean
        self._objection = objection
        self._here: int | None = None  # the step last saved or restored
        self._pending: Any = None
        self._preempted = False
        self._old_handler: Any = None

    def __enter__(self) -> Checkpoints:
        from orbax.checkpoint import v1 as ocp  # half a second: only for who saves

        for logger in _LOGGERS:
            logging.getLogger(logger).addFilter(_not_orbax)
        training: Any = ocp.training
        try:
            self._orbax = training.Checkpointer(
                self._directory,
                preservation_policy=training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=self._clean,
            )
        except OSError as error:
            raise self._error(_first_line(error)) from error
        if jax.distributed.is_initialized():  # it has a handler of its own
            processes.listen()
        elif threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        failure = None
        try:
            self._wait()
        except GrpoError as problem:
            failure = problem
        finally:
            self._restore_handler()
        try:
            self._orbax.close()
        except Exception as problem:  # what has failed before is raised here again
            failure = failure or self._error(_first_line(problem))
        finally:
            for logger in _LOGGERS:
                logging.getLogger(logger).removeFilter(_not_orbax)
        if failure and isinstance(error, Exception):
            error.add_note(str(failure))  # what came first is shown first
        elif failure:  # also in the place of sys.exit(0)
            raise failure

    def steps(self) -> list[int]:
        """The finished steps, oldest first, once a pending save has ended."""
        self._wait()
        return self._known()

    def save(
        self, step: int, state: Any, metadata: dict[str, Any], force: bool = False
    ) -> bool:
        """Saves when `every` divides `step`, or when forced; returns whether it did.

        Returns when the arrays are copied (they may be donated then) and writes in the
        background; the next call raises what failed there. A step that this object
        has just saved or restored is not written again.
        Raises `GrpoError` when a write failed, when steps run backwards, when a number
        is not finite, and when the directory holds another run's checkpoints, from
        which this one did not start.
        """
        due = force or step % self._every == 0
        if due or not self._orbax.is_saving_in_progress():
            self._wait()
        if not due or step == self._here:
            return False
        if step < (self._here or 0):
            raise self._error(f"step {step} comes after {self._here}; steps must grow")
        leaves = flatten(state)
        for name, x in leaves.items():
            if not isinstance(x, jax.Array) or not x.size:
                raise GrpoError(
                    f"state: {name} is {type(x).__name__} {getattr(x, 'shape', '')}, "
                    "not a jax array with elements; convert it or leave it out"
                )
        described, broken = describe(leaves)
        if broken:
            raise self._error(
                f"step {step} is not saved: {and_more(broken)} is not finite; finished "
                f"steps: {self._known() or 'none'}. Lower the learning rate, or "
                "compute in float32"
            )
        self._set_aside()
        record = {"step": step, "metadata": metadata, "leaves": described}
        record = json.loads(json.dumps(record))  # as it will be read: 1 becomes "1"
        kept = {"record": record, "crc32": _crc32(record)}
        save = self._orbax.save_async
        try:
            self._pending = step, save(step, leaves, force=True, custom_metadata=kept)
        except Exception as error:
            raise self._failed(step, error) from error
        return True

    def restore(
        self, abstract: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]]:
        """The newest checkpoint, or that of `step`, verified: (step, state, metadata).

        `abstract` is the state in arrays or ShapeDtypeStructs, whose shardings say
        where each leaf goes: the mesh may be another. After an older step is restored,
        the first save renames the newer ones to `STEP.abandoned`.
        Raises `GrpoError` for none, for another structure and for a damaged one.
        Nothing older is taken silently: the message lists the steps to choose from.
        """
        known = self.steps()
        if not known:
            raise self._error("there is none yet")
        step = known[-1] if step is None else step
        if step not in known:
            raise self._error(f"no step {step}; there are {known}")
        record, wanted = self._record(step), flatten(abstract)
        if why := self._objection(record["metadata"]):
            raise self._error(f"step {step} {why}")
        if lines := _difference(record["leaves"], wanted):
            shown = "; ".join(lines[:6]) + ("; …" if len(lines) > 6 else "")
            raise self._error(f"step {step}: {len(lines)} leaves differ: {shown}")
        targets = {name: _target(x) for name, x in wanted.items()}
        loaded = self._read(step, lambda: self._orbax.load(step, targets))
        leaves = {name: _settle(loaded.pop(name), x) for name, x in wanted.items()}
        # types too: a lost file may turn a PRNG key into plain integers
        found, broken = describe(leaves)
        if bad := [name for name in found if found[name] != record["leaves"][name]]:
            what = f"the checksum of {and_more(bad)} does not match"
            raise self._damaged(step, what)
        if broken:
            raise self._damaged(step, f"{and_more(broken)} is not finite")
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())
        self._here = step
        return step, state, record["metadata"]

    def preempted(self) -> bool:
        """Whether to save and leave: some process of the run was sent SIGTERM.

        Ask at every step, on every process: all of them get the same answer at the
        same step. A second SIGTERM ends the process at once.
        """
        self._preempted |= processes.stopping()
        return self._preempted

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._preempted = True
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)
            self._old_handler = None

    def _known(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def _wait(self) -> None:
        """Ends the pending save, if there is one, and raises what went wrong in it."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            raise self._failed(step, error) from error
        self._here = step

    def _error(self, text: str) -> GrpoError:
        return GrpoError(f"checkpoints {self._directory}: {text}")

    def _failed(self, step: int, error: BaseException) -> GrpoError:
        self._orbax.reload()
        why = f"step {step} could not be written ({_first_line(error)})"
        return self._error(f"{why}; finished steps: {self._known() or 'none'}")

    def _damaged(self, step: int, why: str) -> GrpoError:
        others = [s for s in self._known() if s != step]
        choice = f"restore another step explicitly: {others}" if others else "no other"
        return self._error(f"step {step} is damaged ({why}); {choice}")

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        """`read()`, or the damage that Orbax met in one line."""
        # a failed read abandons others, and each would print a page when it ends
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        try:
            with warnings.catch_warnings(action="ignore"):
                try:
                    return read()
                except Exception as error:
                    why = _first_line(error)
                time.sleep(0.1)
                gc.collect()
        finally:
            sys.unraisablehook = hook
        raise self._damaged(step, why)

    def _record(self, step: int) -> dict[str, Any]:
        """What `save` wrote beside the arrays, once its own checksum is right."""
        kept = self._read(step, lambda: self._orbax.metadata(step).custom_metadata)
        record = (kept or {}).get("record", {})
        if record.get("step") != step or kept.get("crc32") != _crc32(record):
            raise self._damaged(step, "its metadata does not match its checksum")
        return record

    def _set_aside(self) -> None:
        """Renames the checkpoints that an older step was chosen over."""
        known = self._known()
        if known and self._here is None:
            raise self._error(f"steps {known} are another run's; restore one first")
        newer = [step for step in known if step > (self._here or 0)]
        for step in newer if jax.process_index() == 0 else ():
            aside = self._orbax.directory / f"{step}.abandoned"
            aside.rmtree(missing_ok=True)
            (self._orbax.directory / str(step)).rename(aside)
        if newer and jax.process_count() > 1:
            multihost_utils.sync_global_devices("grpo_jax: checkpoints set aside")
        if newer:
            self._orbax.reload()


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs each failure by the page; here it is raised in one line."""
    text = f"{record.pathname} {record.getMessage()}"
    return "/orbax/" not in text and "tensorstore_spec" not in text


def _target(x: Any) -> jax.ShapeDtypeStruct:
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _settle(leaf: jax.Array, like: Any) -> jax.Array:
    """Frees a leaf from its device where `like` is free, so that it joins any mesh."""
    if like.committed if isinstance(like, jax.Array) else like.sharding:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(leaf)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(leaf))


def _difference(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """A line for each leaf that the checkpoint and the run do not share."""
    lines = [f"{n}: only in the checkpoint" for n in saved if n not in wanted]
    lines += [f"{n}: not in the checkpoint" for n in wanted if n not in saved]
    return lines + [
        f"{n}: {saved[n][0]} in the checkpoint, {kind(x)} in this run"
        for n, x in wanted.items()
        if n in saved and saved[n][0] != kind(x)
    ]
