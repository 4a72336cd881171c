"""Checks of config fields and of public functions' arguments, and commands' flags.

A value that cannot be used raises a `GrpoError` of one line that names it.
"""

from __future__ import annotations

import argparse
import difflib
import math
import numbers
import re
import sys
from collections.abc import Sequence
from typing import Any, SupportsFloat

import numpy as np

from grpo_jax.errors import GrpoError, one_line

MOST_ROWS = 2**20  # tokens or samples; the cache of more would fit in no memory
MOST = 2**31 - 1  # arrays are indexed, and steps counted, in 32 bits
_KINDS: dict[Any, str] = {
    int: "a whole number",
    numbers.Integral: "a whole number",
    float: "a number",
    SupportsFloat: "a number",
    str: "text",
    bool: "True or False",
    type(None): "None",
}
# How the message says a bound, and what a value must not be.
_BOUNDS = {
    "least": ("{} or more", lambda value, bound: value >= bound),
    "above": ("above {}", lambda value, bound: value > bound),
    "most": ("at most {}", lambda value, bound: value <= bound),
    "below": ("below {}", lambda value, bound: value < bound),
}


def check_value(
    name: str, value: Any, kinds: Sequence[Any], choices: Any = (), **bounds: float
) -> None:
    """Checks that a value has one of the types, and is a choice or within its bounds.

    Args:
      name: what it is called in the message.
      value: the value.
      kinds: types, such as int or NoneType; whole numbers are numbers too.
      choices: all values that are allowed; () for no such list.
      **bounds: `least` and `most` are allowed values; `above` and `below` are not.

    Raises:
      GrpoError: it is not.

    >>> check_value("config.clip_low", 0.0, [float], above=0, most=1)
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.clip_low: 0.0 is out of range; above 0 and at ...
    """
    if value is None and type(None) in kinds:
        return
    accepted = tuple(kinds) + (int,) * (float in kinds)
    if not (bool in kinds if isinstance(value, bool) else isinstance(value, accepted)):
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise GrpoError(
            f"{name}: {_short(value)} is {type(value).__name__}; {wanted} is needed"
        )
    if choices:
        check_choice(name, value, choices)
    elif value != value or value in (math.inf, -math.inf):
        shown = "NaN" if value != value else "infinity"
        raise GrpoError(f"{name}: {shown} is not a value; give a finite number")
    elif not all(_BOUNDS[kind][1](value, bound) for kind, bound in bounds.items()):
        needed = " and ".join(
            _BOUNDS[kind][0].format(f"{bound:,}" if bound >= 1e4 else bound)
            for kind, bound in bounds.items()
        )
        raise GrpoError(f"{name}: {_short(value)} is out of range; {needed} is needed")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Checks that a value, which the message calls `name`, is one of the choices.

    Raises:
      GrpoError: it is not.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), map(str, choices), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        listed = ", ".join(map(repr, choices))
        raise GrpoError(f"{name}: {_short(value)} is not one of {listed}{hint}")


def check_whole(
    function: str, *, least: int = 1, most: int = MOST, **values: Any
) -> None:
    """Checks that each argument in `values` is a whole number from `least` to `most`.

    >>> check_whole("generate", samples=0)
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: generate: samples: 0 is out of range; 1 or more and at...
    """
    for name, value in values.items():
        kinds = [numbers.Integral]
        check_value(f"{function}: {name}", value, kinds, least=least, most=most)


def check_number(
    function: str, *, least: float = 0.0, most: float = math.inf, **values: Any
) -> None:
    """Checks that each argument in `values` is a finite number in [least, most]."""
    for name, value in values.items():
        kinds = [SupportsFloat]
        check_value(f"{function}: {name}", value, kinds, least=least, most=most)


def check_token_ids(
    function: str, lists: Sequence[Any], vocab_size: int, *, what: str = "prompt"
) -> None:
    """Checks that `lists` are lists of token ids of the vocabulary.

    An embedding lookup raises no error for ids out of range; it returns other rows.

    Args:
      function: the name of the calling function.
      lists: the lists of token ids.
      vocab_size: the size of the vocabulary.
      what: what a list is called in the message.

    Raises:
      GrpoError: they are not.
    """
    if isinstance(lists, str | bytes):
        raise GrpoError(f"{function}: {what}s are a text; give lists of token ids")
    for i, ids in enumerate(lists):
        found = np.asarray(ids)
        whole = np.issubdtype(found.dtype, np.integer) or not found.size
        if found.ndim != 1 or not whole:
            kind = type(ids).__name__
            raise GrpoError(
                f"{function}: {what} {i} is {kind}; give a list of token ids, as the "
                "tokenizer's encode does"
            )
        wrong = found[(found < 0) | (found >= vocab_size)]
        if wrong.size:
            raise GrpoError(
                f"{function}: {what} {i} has the token {wrong[0]}; the model has 0 to "
                f"{vocab_size - 1}"
            )


def check_request(
    function: str,
    vocab_size: int,
    max_new_tokens: Any,
    eos_id: Any,
    samples: Any = 1,
    slots: Any = None,
    cache_dtype: Any = None,
) -> None:
    """Checks the arguments of a sampler; they are named as in `sampler.generate`.

    Raises:
      GrpoError: one of them cannot be used.
    """
    sizes = {"samples": samples, "max_new_tokens": max_new_tokens}
    check_whole(function, most=MOST_ROWS, **sizes)
    if slots is not None:
        check_whole(function, slots=slots)
    ids = [eos_id] if np.ndim(eos_id) == 0 else eos_id
    if not len(ids):
        raise GrpoError(f"{function}: eos_id is empty; give the id that ends a row")
    for one in ids:  # -1 is no token, so that outputs never end early
        check_whole(function, least=-1, most=vocab_size - 1, eos_id=one)
    dtypes = (None, "float32", "bfloat16")
    check_choice(f"{function}: cache_dtype", cache_dtype, dtypes)


def _short(value: Any) -> str:
    return one_line(repr(value))[:80]


# -- the flags of commands -------------------------------------------------------------

LONGEST = 10**6  # the longest time-out in seconds: 11 days
# What starts a command on several hosts: flag → (default, least, most, help).
PROCESS_FLAGS: dict[str, tuple[Any, Any, Any, str]] = {
    "coordinator": (None, None, None, "host:port of process 0, if no cluster says it"),
    "num_processes": (None, 1, MOST_ROWS, "how many processes there are"),
    "process_id": (None, 0, MOST_ROWS, "which of them this is, from 0"),
    "wait": (300, 1, LONGEST, "seconds for all processes to come"),
    "heartbeat": (100, 1, LONGEST, "seconds until a silent process counts as lost"),
}


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose flags have underscores; dashes in them are understood too."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_WithDefaults, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Parses `args`, by default those of the process; `parse_args` calls it."""
        args = underscore_flags(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)


class _WithDefaults(argparse.HelpFormatter):
    def _get_help_string(self, action):
        known = action.default not in (None, argparse.SUPPRESS)
        shown = known and action.default is not False
        return f"{action.help} (%(default)s)" if shown else action.help


def underscore_flags(arguments: Sequence[str]) -> list[str]:
    """Returns a command line with the dashes inside its flags as underscores.

    >>> underscore_flags(["--few-shot", "--data-dir=a-b", "--out", "a-b"])
    ['--few_shot', '--data_dir=a-b', '--out', 'a-b']
    """
    name = re.compile(r"(?<=^--)[^=]+")
    return [name.sub(lambda x: x[0].replace("-", "_"), given) for given in arguments]
