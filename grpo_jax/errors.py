"""The exception whose message is written for the user, and helpers for messages.

A `GrpoError` says in one line what is wrong and what to do about it. The commands print
it and exit with 1.
"""

import contextlib
import errno
import sys
from collections.abc import Iterator


class GrpoError(ValueError):
    """A mistake in a config, a file or an input that the user can correct.

    >>> raise GrpoError("config.group_size: 1 is below 2; set it to 2 or more")
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.group_size: 1 is below 2; set it to 2 or more
    """


def one_line(error: object) -> str:
    r"""Returns another library's error, or a name from a file, as one printable line.

    >>> one_line("bad value\n  at line 3")
    'bad value at line 3'
    """
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 200 else text[:199] + "…"


def disk_full(error: OSError, where: object) -> str:
    """Returns one line on a full disk; "" if the error is another one.

    Args:
      error: what was raised.
      where: named in the line if the error names no file.

    >>> disk_full(OSError(errno.ENOSPC, "No space left on device"), "runs/tiny")
    'runs/tiny: No space left on device'
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    return f"{error.filename or where}: {error.strerror}"


def out_of_memory(error: BaseException) -> str:
    """Returns the error's line on missing memory; "" if the error is another one.

    XLA's allocators and its CPU runtime report it with different texts, and NumPy
    raises a MemoryError.

    >>> out_of_memory(MemoryError("Unable to allocate 2 TiB for an array"))
    'Unable to allocate 2 TiB for an array'
    >>> out_of_memory(ValueError("no"))
    ''
    """
    signs = ("RESOURCE_EXHAUSTED", "Out of memory")
    lines = [line for line in str(error).splitlines() if any(x in line for x in signs)]
    if isinstance(error, MemoryError) and not lines:
        lines = (str(error) or "of the host").splitlines()
    return lines[0] if lines else ""


@contextlib.contextmanager
def errors_as_one_line(
    folder: object = "",
    *,
    disk: str = "Make room there, and start again",
    memory: str = "use a machine that has more",
) -> Iterator[None]:
    """Ends the program with one line on an error that its user can act on.

    Args:
      folder: where the program writes.
      disk: what to do about a full disk.
      memory: what to do where memory runs out.

    >>> with errors_as_one_line():
    ...     raise GrpoError("config.group_size: 1 is below 2")
    Traceback (most recent call last):
    ...
    SystemExit: error: config.group_size: 1 is below 2
    """
    try:
        yield
    except GrpoError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if isinstance(error, OSError) and (what := disk_full(error, folder)):
            sys.exit(f"error: {what}; {disk}")
        if what := out_of_memory(error):
            sys.exit(f"error: out of memory ({what}); {memory}")
        raise


class Preempted(Exception):
    """The run was asked to stop, and its state is saved."""
