"""A lock on a folder, so that only one run at a time writes there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from grpo_jax.errors import GrpoError


@contextlib.contextmanager
def lock_folder(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates `workdir` and locks it, so that no second run writes there.

    The lock is released when the process ends, however it ends. With several processes,
    call it after `jax.distributed.initialize`; process 0 holds the lock for all.

    Raises:
      GrpoError: another process holds the lock, or the directory is not writable.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with lock_folder(parent + "/run") as workdir:
    ...         workdir.name
    'run'
    """
    workdir = Path(workdir)
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        yield workdir
        return

    def not_writable(error: OSError) -> GrpoError:
        why = f"cannot be written ({error.strerror})"
        return GrpoError(f"workdir {workdir}: {why}; choose another")

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(workdir / ".lock", "ab+", buffering=0)
        # An old lock may be there while the folder takes no new file.
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise not_writable(error) from None
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
            raise not_writable(error) from None
        yield workdir
