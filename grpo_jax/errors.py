"""The one exception that a user is meant to read.

In: what went wrong and what to do about it, in one line.
Out: `GrpoError`; `train.py` and the module commands print it and exit with 1.
"""


class GrpoError(ValueError):
    """A mistake in a config, a file or an input that the user can put right.

    >>> raise GrpoError("config.group_size: 1 is below 2; set it to 2 or more")
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.group_size: 1 is below 2; set it to 2 or more
    """


def out_of_memory(error: Exception) -> str:
    """What an error says of the memory that was asked for; "" if it is another error.

    XLA's allocators have one status for it, the dispatch of its CPU programs another,
    and NumPy raises a MemoryError.

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
