"""Packs sequences of different lengths into rows of one length, several to a row.

A `Batch` has arrays [A, B, T]: A micro-batches of B rows of T positions. Position t of
a row holds an input token (`tokens`) and the token to be predicted from it (`targets`);
all other arrays belong to the target. `segment_ids` tells the samples of a row apart,
and their positions start at 0.

With `share_prompts`, outputs of one question that stand in the same row share its
prompt. The prompt is stored once, without its last token. Each output's segment starts
with that last token and attends to the prompt and itself
(`models/kernels/mask.py`, `shares_prompt`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from grpo_jax.arguments import check_whole
from grpo_jax.errors import GrpoError
from grpo_jax.models.kernels.mask import PROMPT
from grpo_jax.training.batch import FROM_SAMPLE, Batch, Sample
from grpo_jax.training.row_placement import (
    Row,
    group_by_prompt,
    place_in_rows,
    row_lengths,
    shared_positions,
)


def pack(
    samples: Sequence[Sample],
    *,
    length: int,
    rows: int = 1,
    share: bool = True,
    share_prompts: bool = False,
    together: int = 1,
    of: Sequence[Sample] | None = None,
) -> Batch:
    """Packs samples into micro-batches of `rows` rows of `length` positions.

    Args:
      samples: the sequences to pack.
      length: T. A sample of n tokens takes n - 1 positions.
      rows: B, rows of a micro-batch; a multiple of the mesh's data × fsdp.
      share: False gives every sample its own row, for models without segments.
      share_prompts: store a prompt once for all its outputs in a row. The model must
        support it (`shares_prompt`), as this package's decoder does.
      together: this many consecutive samples stay side by side in a row; 2 for pairs.
      of: all samples of the batch, if samples without a gradient were left out. Losses
        are divided as if these were there.

    Returns:
      The batch, as NumPy arrays on the host.

    Raises:
      GrpoError: a sample does not fit a row, a per-token list is not as long as the
        sample's tokens, or a size is below 1.

    >>> batch = pack([Sample(tokens=[5, 6, 7], mask=[0, 1, 1]),
    ...               Sample(tokens=[8, 9], mask=[0, 1])], length=4)
    >>> batch.tokens.tolist(), batch.targets.tolist(), batch.segment_ids.tolist()
    ([[[5, 6, 8, 0]]], [[[6, 7, 9, 0]]], [[[1, 1, 2, 0]]])
    """
    of = samples if of is None else of
    if not of:
        raise GrpoError("pack: no samples")
    check_whole("pack", length=length, rows=rows, together=together)
    if len(samples) % together:
        raise GrpoError(
            f"pack: {len(samples)} samples are no multiple of together, {together}"
        )
    for i, sample in enumerate(samples):
        _check_lists(i, sample, of[0])
    placed = place_in_rows(samples, length, share, share_prompts, together)
    used = -(-len(placed) // rows)
    spans = _spans(samples, placed, share_prompts)
    arrays = _fill_arrays(samples, of[0], spans, (used * rows, length))
    return Batch(
        **{k: x.reshape(used, rows, length) for k, x in arrays.items()},
        used=np.int32(used),
        sequences=np.int32(len(of)),
        loss_tokens=np.int32(sum(np.count_nonzero(s.mask[1:]) for s in of)),
    )


def _check_lists(i: int, sample: Sample, first: Sample) -> None:
    """Checks that per-token lists have one value a token, and all samples have them.

    NumPy would broadcast a list of one value to all tokens. A field that only some
    samples have would be dropped or become NaN.
    """
    n = len(sample.tokens)
    for name in ("mask", *FROM_SAMPLE.values()):
        values = getattr(sample, name)
        if (values is None) != (getattr(first, name) is None):
            raise GrpoError(f"pack: of samples 0 and {i} only one has {name}")
        if hasattr(values, "__len__") and len(values) != n:
            raise GrpoError(
                f"pack: sample {i} has {n} tokens and {len(values)} values of {name}; "
                "one a token is needed"
            )


def fitting_length(
    samples: Sequence[Sample],
    *,
    longest: int,
    choices: int = 16,
    rows: int = 1,
    share_prompts: bool = False,
    together: int = 1,
    padding: float = 0.05,
) -> int:
    """Returns a row length up to `longest` that leaves little padding.

    Many samples fill rows of `longest` well enough, and all batches of a run then have
    one shape. Few samples leave much of the last row empty; they get the best of
    `choices` lengths, down to half of `longest`. Each length is compiled separately.

    Args:
      samples: the sequences to pack.
      longest: the largest length of a row.
      choices: how many lengths there are.
      rows, share_prompts, together: as in `pack`.
      padding: the share of empty positions up to which `longest` is taken.

    >>> samples = [Sample(tokens=[0] * 33, mask=[1] * 33)] * 3
    >>> fitting_length(samples, longest=64), fitting_length(samples, longest=32)
    (34, 32)
    """
    groups = group_by_prompt(samples, share_prompts, together)
    shortest = max(group.longest for group in groups)
    positions = sum(group.positions for group in groups)
    best, least = longest, 0
    for length in row_lengths(longest, choices):
        if length < shortest:
            break
        if least and -(-positions // length) * length >= least:
            continue
        placed = place_in_rows(samples, length, True, share_prompts, together)
        size = -(-len(placed) // rows) * rows * length
        if not least or size < least:
            best, least = length, size
        if length == longest:
            spans = _spans(samples, placed, share_prompts)
            if sum(span.stop - span.first for span in spans) > (1 - padding) * size:
                break
    return best


def unpack(
    values: Any,
    samples: Sequence[Sample],
    *,
    share: bool = True,
    share_prompts: bool = False,
    together: int = 1,
) -> list[np.ndarray]:
    """Returns each sample's part of the values [A, B, T] of a packed batch.

    A sample of n tokens has n - 1 values: value t belongs to the position that takes
    token t and predicts token t + 1.

    Args:
      values: [A, B, T], computed from the batch of `pack` with the same samples.
      samples: the samples that were packed.
      share, share_prompts, together: as in `pack`.

    Returns:
      An array [n - 1] for each sample.

    >>> samples = [Sample(tokens=[5, 6], mask=[0, 1]),
    ...            Sample(tokens=[7, 8, 9], mask=[0, 1, 1])]
    >>> [x.tolist() for x in unpack(pack(samples, length=4).targets, samples)]
    [[6], [8, 9]]
    """
    values = np.asarray(values)
    rows = values.reshape(-1, values.shape[-1])
    placed = place_in_rows(samples, rows.shape[1], share, share_prompts, together)
    found = [np.zeros(len(s.tokens) - 1, values.dtype) for s in samples]
    for span in _spans(samples, placed, share_prompts):
        here = rows[span.row, span.start : span.start + span.stop - span.first]
        for i in span.of:
            found[i][span.first : span.stop] = here
    return found


@dataclasses.dataclass(frozen=True)
class _Span:
    """Positions first to stop of a sample, at `start` of a row."""

    row: int
    start: int
    of: list[int]  # the samples that share them
    first: int
    stop: int
    segment: int


def _spans(
    samples: Sequence[Sample], placed: list[Row], share_prompts: bool
) -> Iterator[_Span]:
    for row, prompts in enumerate(placed):
        at, segment = 0, 0
        for number, members in enumerate(prompts, start=1):
            base = PROMPT * number if share_prompts else 0
            first = shared_positions(samples[members[0]], share_prompts)
            if first:
                yield _Span(row, at, members, 0, first, base)
            at += first
            for i in members:
                segment += 1
                stop = len(samples[i].tokens) - 1
                yield _Span(row, at, [i], first, stop, base + segment)
                at += stop - first


def _fill_arrays(samples, like, spans: Iterator[_Span], shape) -> dict[str, np.ndarray]:
    extra = {k: v for k, v in FROM_SAMPLE.items() if getattr(like, v) is not None}
    of_target = {"targets": "tokens", "mask": "mask"} | extra
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), np.int32)
    dtypes |= {"mask": bool} | dict.fromkeys(extra, np.float32)
    arrays = {name: np.zeros(shape, dtype) for name, dtype in dtypes.items()}
    for span in spans:
        sample, first, stop = samples[span.of[0]], span.first, span.stop
        here = (span.row, slice(span.start, span.start + stop - first))
        arrays["tokens"][here] = sample.tokens[first:stop]
        arrays["positions"][here] = np.arange(first, stop)
        arrays["segment_ids"][here] = span.segment
        for name, field in of_target.items():
            values = getattr(sample, field)
            each = hasattr(values, "__len__")  # else one for all tokens
            arrays[name][here] = values[first + 1 : stop + 1] if each else values
    return arrays
