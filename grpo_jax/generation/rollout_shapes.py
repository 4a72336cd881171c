"""Sizes of a rollout: few shapes for many requests, so that few programs compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from grpo_jax.errors import GrpoError


@dataclasses.dataclass(frozen=True)
class RolloutShape:
    """The static shape of a request; many numbers of prompts share one program."""

    copies: int  # consecutive copies of each prompt
    samples: int  # drawn from each copy
    prompts: int  # P, copies and padding included
    width: int  # S
    slots: int  # W of each group of devices


def rollout_shape(
    prompts: int,
    longest: int,
    samples: int,
    *,
    groups: int = 1,
    slots: int | None = None,
) -> RolloutShape:
    """Returns the shape of a request that is split over groups of devices.

    If there are fewer prompts than groups, several groups share a prompt's samples.

    Args:
      prompts: number of prompts.
      longest: tokens of the longest prompt.
      samples: completions of each prompt.
      groups: number of groups of devices.
      slots: rows decoded at a time by all groups together; None for `default_slots`.

    >>> rollout_shape(16, 100, 64, groups=64)
    RolloutShape(copies=4, samples=16, prompts=64, width=128, slots=16)
    """
    fit = [n for n in range(1, samples + 1) if not samples % n]
    copies = max([n for n in fit if n * prompts <= groups], default=1)
    each = -(-prompts * copies // groups)
    each = bucket_length(each, smallest=2) if each > 1 else 1
    samples //= copies
    if slots is None:
        slots = default_slots(each * samples)
    else:
        slots = -(-slots // groups)
    return RolloutShape(copies, samples, each * groups, bucket_length(longest), slots)


def as_token_ids(ids: int | Sequence[int]) -> tuple[int, ...]:
    """Returns one token id or several as a tuple of Python integers."""
    return (int(ids),) if isinstance(ids, int | np.integer) else tuple(map(int, ids))


def default_slots(rows: int) -> int:
    """Returns how many rows to decode at a time: all up to 128, then a quarter.

    A turn of 64 rows costs far less than two turns of 32, as each turn reads all
    weights. A quarter leaves few slots idle when completions differ in length. Rows
    that begin together read no older blocks of the cache.

    >>> [default_slots(n) for n in (8, 100, 1024)]
    [8, 100, 256]
    """
    return min(rows, max(128, rows // 4))


def bucket_length(length: int, *, smallest: int = 16) -> int:
    """Rounds up to one of 16, 24, 32, 48, 64, 96, …, so that a run compiles few shapes.

    >>> [bucket_length(n) for n in (1, 17, 25, 100)]
    [16, 24, 32, 128]
    """
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_token_lists(lists: Sequence[Sequence[int]], rows: int, width: int):
    """Pads lists of token ids on the right.

    Returns:
      [rows, width] int32 tokens and the [rows, width] bool mask of the real ones.
    """
    tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for i, ids in enumerate(lists):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return tokens, mask


def as_stop_sequences(stop: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Returns the stop sequences as tuples of token ids.

    Raises:
      GrpoError: one is a string, or empty.
    """
    if isinstance(stop, str) or any(isinstance(s, str) for s in stop):
        raise GrpoError("generate: stop holds a text; give token ids, or a stop_table")
    if not all(len(s) for s in stop):
        raise GrpoError("generate: a stop sequence is empty")
    return tuple(as_token_ids(s) for s in stop)
