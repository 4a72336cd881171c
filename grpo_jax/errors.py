"""The one exception that a user is meant to read.

In: what went wrong and what to do about it, in one line.
Out: `GrpoError`; `train.py` and the module commands print it and exit with 1.
"""

import errno


class GrpoError(ValueError):
    """A mistake in a config, a file or an input that the user can put right.

    >>> raise GrpoError("config.group_size: 1 is below 2; set it to 2 or more")
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.group_size: 1 is below 2; set it to 2 or more
    """


def one_line(error: object) -> str:
    r"""What another library says is wrong, or a name from a file, for a message.

    >>> one_line("bad value\n  at line 3")
    'bad value at line 3'
    """
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 200 else text[:199] + "…"


def disk_full(error: OSError, where: object) -> str:
    """What says, in one line, that a file found no room; "" is another error.

    where: for an error that names no file.

    >>> disk_full(OSError(errno.ENOSPC, "No space left on device"), "runs/tiny")
    'runs/tiny: No space left on device'
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    return f"{error.filename or where}: {error.strerror}"


def out_of_memory(error: BaseException) -> str:
    """What says, in one line, that memory ran out, with the size; "" is another error.

    GPUs and TPUs raise RESOURCE_EXHAUSTED, a CPU an internal error, NumPy MemoryError.

    >>> out_of_memory(RuntimeError("INTERNAL: Out of memory allocating 64 bytes.\\n…"))
    'INTERNAL: Out of memory allocating 64 bytes.'
    """
    text = str(error)
    known = "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    if not known and not isinstance(error, MemoryError):
        return ""
    return (text.splitlines() or [type(error).__name__])[0]


class Preempted(Exception):
    """The run was asked to stop, and its state is saved."""
