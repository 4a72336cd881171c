"""Argument checks of public functions: numbers, choices and lists of token ids.

Each takes the name of the function that calls it, for the message, and raises a
`GrpoError` of one line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.errors import GrpoError

MOST_ROWS = 2**20  # tokens or samples; the cache of more would fit in no memory
MOST = 2**31 - 1  # arrays are indexed, and steps counted, in 32 bits


def check_whole(
    function: str, *, least: int = 1, most: int = MOST, **values: Any
) -> None:
    """Checks that each argument in `values` is a whole number from `least` to `most`.

    >>> check_whole("generate", samples=0)
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: generate: samples = 0; a whole number from 1 to 2,147,...
    """
    for name, value in values.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not least <= value <= most:
            raise GrpoError(
                f"{function}: {name} = {_short(value)}; a whole number from {least} to "
                f"{most:,} is needed"
            )


def check_number(
    function: str, *, least: float = 0.0, most: float = math.inf, **values: Any
) -> None:
    """Checks that each argument in `values` is a finite number in [least, most]."""
    for name, value in values.items():
        try:
            good = math.isfinite(value) and least <= value <= most
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            bounds = f" from {least:g}" if math.isfinite(least) else ""
            bounds += f" to {most:g}" if math.isfinite(most) else ""
            raise GrpoError(
                f"{function}: {name} = {_short(value)}; a finite number{bounds} is "
                "needed"
            )


def check_choice(function: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Checks that the argument `name` has one of the given values."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise GrpoError(f"{function}: {name} = {_short(value)}; use one of {known}")


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
    """
    if isinstance(lists, str | bytes):
        raise GrpoError(f"{function}: {what}s are a text; give lists of token ids")
    for i, ids in enumerate(lists):
        if isinstance(ids, str | bytes) or np.ndim(ids) != 1:
            kind = type(ids).__name__
            raise GrpoError(
                f"{function}: {what} {i} is {kind}; give a list of token ids, as the "
                "tokenizer's encode does"
            )
        numbers = np.asarray(ids)
        if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
            raise GrpoError(f"{function}: {what} {i} holds {numbers.dtype}; give ids")
        wrong = numbers[(numbers < 0) | (numbers >= vocab_size)]
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
    """Checks the arguments of a sampler; they are named as in `sampler.generate`."""
    check_whole(function, most=MOST_ROWS, samples=samples)
    check_whole(function, most=MOST_ROWS, max_new_tokens=max_new_tokens)
    if slots is not None:
        check_whole(function, slots=slots)
    ids = [eos_id] if np.ndim(eos_id) == 0 else eos_id
    if not len(ids):
        raise GrpoError(f"{function}: eos_id is empty; give the id that ends a row")
    for one in ids:  # -1 is no token, so that outputs never end early
        check_whole(function, least=-1, most=vocab_size - 1, eos_id=one)
    check_choice(function, "cache_dtype", cache_dtype, (None, "float32", "bfloat16"))


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
