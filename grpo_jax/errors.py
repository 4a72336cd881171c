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


def one_line(error: object) -> str:
    r"""What another library says is wrong, or a name from a file, for a message.

    >>> one_line("bad value\n  at line 3")
    'bad value at line 3'
    """
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 200 else text[:199] + "…"
