"""Sequences of different lengths → rows of one length, hardly any of it padding.

In: samples (a prompt's and its completion's tokens, with what belongs to each token).
Out: a `Batch` of arrays [A, B, T]: A micro-batches of B rows of T positions.

Position t of a row holds the token that goes in (`tokens`) and the one to be predicted
from it (`targets`); everything else in the batch is about the prediction. Several
samples share a row: `segment_ids` tells them apart, positions start again at 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.errors import GrpoError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence: all per-token lists are as long as `tokens`."""

    tokens: Sequence[int]
    mask: Sequence[int]  # 1 where the token counts in the loss: never the prompt
    advantages: Sequence[float] | float | None = None  # Â, or one for every token
    logps: Sequence[float] | None = None  # the sampler's


_PER_TOKEN = (
    "tokens",
    "targets",
    "positions",
    "segment_ids",
    "mask",
    "advantages",
    "sampler_logps",
    "old_logps",
    "ref_logps",
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*_PER_TOKEN, "used", "sequences"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows; [A, B, T] unless said otherwise. None: not used by the objective."""

    tokens: Any  # int32
    targets: Any  # int32, the token after each of `tokens`
    positions: Any  # int32, from 0 in each segment
    segment_ids: Any  # int32, from 1 in each row; 0 is padding
    mask: Any  # bool: the target counts in the loss
    advantages: Any = None  # float32
    sampler_logps: Any = None  # float32, log-probabilities when the target was sampled
    old_logps: Any = None  # float32, log π_old; None: ρ = 1
    ref_logps: Any = None  # float32, log π_ref; None: computed in the step
    used: Any = None  # int32 []: micro-batches that hold anything
    sequences: Any = None  # int32 []: samples in the whole batch

    def micro(self, index: Any) -> Batch:
        """Micro-batch number `index`: [B, T]."""
        take = {
            name: None if value is None else value[index]
            for name in _PER_TOKEN
            for value in [getattr(self, name)]
        }
        return dataclasses.replace(self, **take)

    def with_capacity(self, capacity: int) -> Batch:
        """The same with A = capacity, so that every batch of a run has one shape."""
        missing = capacity - self.tokens.shape[0]
        if missing < 0:
            raise GrpoError(f"pack: {self.tokens.shape[0]} micro-batches > {capacity}")

        def pad(x):
            return None if x is None else np.pad(x, ((0, missing), (0, 0), (0, 0)))

        padded = {name: pad(getattr(self, name)) for name in _PER_TOKEN}
        return dataclasses.replace(self, **padded)


def first_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which items share a bin of `size`: longest first, each into the first that fits.

    >>> first_fit([3, 6, 5, 2], 8)
    [[1, 3], [2, 0]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (n for n, space in enumerate(room) if lengths[item] <= space)
        number = next(fits, len(bins))
        if number == len(bins):
            bins.append([])
            room.append(size)
        bins[number].append(item)
        room[number] -= lengths[item]
    return bins


def pack(
    samples: Sequence[Sample],
    *,
    length: int,
    rows: int = 1,
    share: bool = True,
) -> Batch:
    """Lay samples out in micro-batches of `rows` rows of `length` positions.

    Args:
      length: T. A sample of n tokens takes n - 1 positions.
      rows: B, rows of a micro-batch; a multiple of the mesh's data × fsdp.
      share: False gives every sample a row of its own, for models without segments.

    Raises:
      GrpoError: a sample that does not fit a row.

    >>> batch = pack([Sample(tokens=[5, 6, 7], mask=[0, 1, 1]),
    ...               Sample(tokens=[8, 9], mask=[0, 1])], length=4)
    >>> batch.tokens.tolist(), batch.targets.tolist(), batch.segment_ids.tolist()
    ([[[5, 6, 8, 0]]], [[[6, 7, 9, 0]]], [[[1, 1, 2, 0]]])
    """
    if not samples:
        raise GrpoError("pack: no samples")
    lengths = [len(sample.tokens) - 1 for sample in samples]
    for i, n in enumerate(lengths):
        if not 1 <= n <= length:
            raise GrpoError(
                f"pack: sample {i} has {n + 1} tokens; 2 to {length + 1} fit a row"
            )
    bins = first_fit(lengths, length) if share else [[i] for i in range(len(samples))]
    used = -(-len(bins) // rows)
    arrays = _fill(samples, bins, (used * rows, length))
    return Batch(
        **{k: x.reshape(used, rows, length) for k, x in arrays.items()},
        used=np.int32(used),
        sequences=np.int32(len(samples)),
    )


def _fill(samples, bins, shape) -> dict[str, np.ndarray]:
    arrays = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "targets", "positions", "segment_ids")
    }
    arrays["mask"] = np.zeros(shape, bool)
    if samples[0].advantages is not None:
        arrays["advantages"] = np.zeros(shape, np.float32)
    if samples[0].logps is not None:
        arrays["sampler_logps"] = np.zeros(shape, np.float32)
    for row, members in enumerate(bins):
        at = 0
        for segment, i in enumerate(members, start=1):
            sample, n = samples[i], len(samples[i].tokens) - 1
            here = (row, slice(at, at + n))
            arrays["tokens"][here] = sample.tokens[:-1]
            arrays["targets"][here] = sample.tokens[1:]
            arrays["positions"][here] = np.arange(n)
            arrays["segment_ids"][here] = segment
            arrays["mask"][here] = sample.mask[1:]
            if sample.advantages is not None:
                advantages = np.asarray(sample.advantages, np.float32)
                arrays["advantages"][here] = (
                    advantages[1:] if advantages.ndim else advantages
                )
            if sample.logps is not None:
                arrays["sampler_logps"][here] = sample.logps[1:]
            at += n
    return arrays
