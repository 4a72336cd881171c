"""Saves and restores the state of a run.

A state is a pytree of jax arrays (typed PRNG keys included), on one device or on the
mesh of many processes, with a dictionary of JSON metadata. Orbax writes one folder per
step while training continues. Each leaf has a checksum, which is verified on restore.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from grpo_jax.checkpoints.checksums import (
    checksum_leaves,
    dtype_and_shape,
    first_and_count,
    named_leaves,
)
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError

_LOGGERS = (None, "absl", "asyncio")  # through which Orbax tells of failures


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _first_line(error: BaseException) -> str:
    """Returns the cause at the bottom of a chain of exceptions, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [""])[0].split(" [tensorstore_spec")[0]
    ends = f"{text[:120]} … {text[-170:]}"  # the cause may be at either end
    return f"{type(error).__name__}: {ends if len(text) > 300 else text}"


class CheckpointDirectory:
    """A directory of checkpoints, one folder per step; use it in a `with` statement.

    Leaving the block finishes a pending save, also after an exception or `sys.exit`.
    All processes of a run must make the same calls in the same order.

    Args:
      directory: where checkpoints are; created if missing.
      every: `save` writes at steps that are multiples of this.
      keep: how many of the newest checkpoints are kept.
      clean: remove unfinished checkpoints of a killed run. Set it to False if another
        run may be writing there.
      objection: maps a checkpoint's metadata to the reason not to restore it, or "".

    Raises:
      GrpoError: `every` or `keep` is below 1, or the directory cannot be opened.

    >>> import tempfile
    >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with CheckpointDirectory(folder, every=2) as checkpoints:
    ...         saved = checkpoints.save(2, state, {"loss": 0.5})
    ...     with CheckpointDirectory(folder, every=2) as checkpoints:
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
        self._last_step: int | None = None  # the step last saved or restored
        self._pending: Any = None
        self._preempted = False
        self._old_handler: Any = None

    def __enter__(self) -> CheckpointDirectory:
        from orbax.checkpoint import v1 as ocp  # imported late: it takes half a second

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
        if jax.distributed.is_initialized():  # which has its own SIGTERM handler
            processes.claim_preemption_manager()
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
        except Exception as problem:  # Orbax raises an earlier failure again
            failure = failure or self._error(_first_line(problem))
        finally:
            for logger in _LOGGERS:
                logging.getLogger(logger).removeFilter(_not_orbax)
        if failure and isinstance(error, Exception):
            error.add_note(str(failure))  # the first error is shown first
        elif failure:  # also instead of sys.exit(0)
            raise failure

    def steps(self) -> list[int]:
        """Waits for a pending save and returns the finished steps, oldest first."""
        self._wait()
        return self._finished_steps()

    def save(
        self, step: int, state: Any, metadata: dict[str, Any], force: bool = False
    ) -> bool:
        """Saves the state if `step` is a multiple of `every`, or if forced.

        Returns as soon as the arrays are copied; they may then be donated. Writing goes
        on in the background, and the next call raises an error that occurs there. A
        step that was just saved or restored is not written again.

        Args:
          step: the number of the step; steps must grow.
          state: pytree of jax arrays, none of them empty.
          metadata: a dictionary of JSON values.
          force: save at any step.

        Returns:
          Whether the state is being saved.

        Raises:
          GrpoError: a write failed, the step is before the last one, a number is not
            finite, a leaf is no jax array, or the directory holds another run's
            checkpoints from which this run did not start.
        """
        due = force or step % self._every == 0
        if due or not self._orbax.is_saving_in_progress():
            self._wait()
        if not due or step == self._last_step:
            return False
        if step < (self._last_step or 0):
            raise self._error(
                f"step {step} comes after {self._last_step}; steps must grow"
            )
        leaves = named_leaves(state)
        for name, x in leaves.items():
            if not isinstance(x, jax.Array) or not x.size:
                raise GrpoError(
                    f"state: {name} is {type(x).__name__} {getattr(x, 'shape', '')}, "
                    "not a jax array with elements; convert it or leave it out"
                )
        described, broken = checksum_leaves(leaves)
        if broken:
            raise self._error(
                f"step {step} is not saved: {first_and_count(broken)} is not finite; "
                f"finished steps: {self._finished_steps() or 'none'}. Lower the "
                "learning rate, or compute in float32"
            )
        self._abandon_newer()
        record = {"step": step, "metadata": metadata, "leaves": described}
        record = json.loads(json.dumps(record))  # as read back: 1 becomes "1"
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
        """Restores and verifies the newest checkpoint, or that of `step`.

        After an older step is restored, the first save renames the newer ones to
        `STEP.abandoned`. A damaged checkpoint is never replaced by an older one
        silently: the message lists the steps to choose from.

        Args:
          abstract: the state as arrays or ShapeDtypeStructs. Their shardings say where
            each leaf goes; the mesh may differ from the one that saved.
          step: the step, or None for the newest.

        Returns:
          (step, state, metadata).

        Raises:
          GrpoError: there is no checkpoint, its structure differs, it is damaged, or
            `objection` rejects it.
        """
        known = self.steps()
        if not known:
            raise self._error("there is none yet")
        step = known[-1] if step is None else step
        if step not in known:
            raise self._error(f"no step {step}; there are {known}")
        record, wanted = self._record(step), named_leaves(abstract)
        if why := self._objection(record["metadata"]):
            raise self._error(f"step {step} {why}")
        if lines := _difference(record["leaves"], wanted):
            shown = "; ".join(lines[:6]) + ("; …" if len(lines) > 6 else "")
            raise self._error(f"step {step}: {len(lines)} leaves differ: {shown}")
        targets = {name: _restore_target(x) for name, x in wanted.items()}
        loaded = self._read(step, lambda: self._orbax.load(step, targets))
        leaves = {name: _commit_like(loaded.pop(name), x) for name, x in wanted.items()}
        # Compares types too: a lost file may turn a PRNG key into plain integers.
        found, broken = checksum_leaves(leaves)
        if bad := [name for name in found if found[name] != record["leaves"][name]]:
            what = f"the checksum of {first_and_count(bad)} does not match"
            raise self._damaged(step, what)
        if broken:
            raise self._damaged(step, f"{first_and_count(broken)} is not finite")
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())
        self._last_step = step
        return step, state, record["metadata"]

    def is_preempted(self) -> bool:
        """Returns whether to save and exit, because a process was sent SIGTERM.

        Call it at every step on every process; all get the same answer at the same
        step. In a run of one process, a second SIGTERM ends it at once.
        """
        self._preempted |= processes.is_preempted()
        return self._preempted

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._preempted = True
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)
            self._old_handler = None

    def _finished_steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def _wait(self) -> None:
        """Waits for a pending save and raises the error that occurred in it."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            raise self._failed(step, error) from error
        self._last_step = step

    def _error(self, text: str) -> GrpoError:
        return GrpoError(f"checkpoints {self._directory}: {text}")

    def _failed(self, step: int, error: BaseException) -> GrpoError:
        self._orbax.reload()
        why = f"step {step} could not be written ({_first_line(error)})"
        return self._error(f"{why}; finished steps: {self._finished_steps() or 'none'}")

    def _damaged(self, step: int, why: str) -> GrpoError:
        others = [s for s in self._finished_steps() if s != step]
        choice = f"restore another step explicitly: {others}" if others else "no other"
        return self._error(f"step {step} is damaged ({why}); {choice}")

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        """Returns `read()`; raises an error of Orbax as damage, in one line."""
        # A failed read abandons other reads, and each of them would print a traceback.
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
        """Returns what `save` wrote beside the arrays, after checking its checksum."""
        kept = self._read(step, lambda: self._orbax.metadata(step).custom_metadata)
        record = (kept or {}).get("record", {})
        if record.get("step") != step or kept.get("crc32") != _crc32(record):
            raise self._damaged(step, "its metadata does not match its checksum")
        return record

    def _abandon_newer(self) -> None:
        """Renames the checkpoints that are newer than the restored step."""
        known = self._finished_steps()
        if known and self._last_step is None:
            raise self._error(f"steps {known} are another run's; restore one first")
        newer = [step for step in known if step > (self._last_step or 0)]
        for step in newer if jax.process_index() == 0 else ():
            aside = self._orbax.directory / f"{step}.abandoned"
            aside.rmtree(missing_ok=True)
            (self._orbax.directory / str(step)).rename(aside)
        if newer and jax.process_count() > 1:
            multihost_utils.sync_global_devices("grpo_jax: checkpoints set aside")
        if newer:
            self._orbax.reload()


def _not_orbax(record: logging.LogRecord) -> bool:
    """Filters out Orbax's long logs of failures; they are raised in one line here."""
    text = f"{record.pathname} {record.getMessage()}"
    return "/orbax/" not in text and "tensorstore_spec" not in text


def _restore_target(x: Any) -> jax.ShapeDtypeStruct:
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _commit_like(leaf: jax.Array, like: Any) -> jax.Array:
    """Uncommits a leaf from its device if `like` is uncommitted, to fit any mesh."""
    if like.committed if isinstance(like, jax.Array) else like.sharding:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(leaf)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(leaf))


def _difference(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Returns a line for each leaf that differs between checkpoint and run."""
    lines = [f"{n}: only in the checkpoint" for n in saved if n not in wanted]
    lines += [f"{n}: not in the checkpoint" for n in wanted if n not in saved]
    return lines + [
        f"{n}: {saved[n][0]} in the checkpoint, {dtype_and_shape(x)} in this run"
        for n, x in wanted.items()
        if n in saved and saved[n][0] != dtype_and_shape(x)
    ]
