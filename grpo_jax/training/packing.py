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
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.arguments import check_whole
from grpo_jax.errors import GrpoError
from grpo_jax.models.kernels.mask import PROMPT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence for `pack`; all per-token lists are as long as `tokens`."""

    tokens: Sequence[int]
    mask: Sequence[int]  # 1 if the token counts in the loss; 0 for the prompt
    prompt: int = 0  # how many tokens are the prompt; 0: it is not shared
    advantages: Sequence[float] | float | None = None  # Â, or one for every token
    logps: Sequence[float] | None = None  # the sampler's
    labels: Sequence[float] | None = None  # targets of a reward model
    returns: Sequence[float] | None = None  # targets of PPO's critic
    values: Sequence[float] | None = None  # the critic's values before the update

    @classmethod
    def from_output(
        cls,
        prompt: Sequence[int],
        tokens: Sequence[int],
        *,
        logps: Sequence[float] | None = None,
        advantages: Sequence[float] | float | None = None,
        mask: Sequence[int] | None = None,
    ) -> Sample:
        """Returns the sample of a prompt and an output; only the output is in the loss.

        Args:
          prompt: token ids.
          tokens: the output's token ids, its EOS token included; C of them.
          logps: [C] their log-probabilities when they were sampled, in nats.
          advantages: Â of the output, or of each of its tokens [C].
          mask: [C] 0 where a tool wrote the token; None: the policy sampled all.

        >>> Sample.from_output([7, 8], [9, 2], advantages=0.5).mask
        [0, 0, 1, 1]
        """
        before = len(prompt)
        if advantages is not None and np.ndim(advantages):
            advantages = [0.0] * before + np.asarray(advantages).tolist()
        elif advantages is not None:
            advantages = float(advantages)  # type: ignore[arg-type]
        return cls(
            tokens=[*map(int, prompt), *map(int, tokens)],
            mask=[0] * before + [int(m) for m in mask or [1] * len(tokens)],
            logps=None if logps is None else [0.0] * before + [float(x) for x in logps],
            advantages=advantages,
            prompt=before,
        )


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
    "labels",
    "returns",
    "old_values",
)
# Per-token numbers of a Batch → the field of Sample that holds them.
_FROM_SAMPLE = {
    "advantages": "advantages",
    "sampler_logps": "logps",
    "labels": "labels",
    "returns": "returns",
    "old_values": "values",
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*_PER_TOKEN, "used", "sequences", "loss_tokens"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows, [A, B, T] unless said otherwise; None: the loss does not use it."""

    tokens: Any  # int32
    targets: Any  # int32, the token after each of `tokens`
    positions: Any  # int32, from 0 in each segment
    segment_ids: Any  # int32, from 1 in each row; 0 is padding
    mask: Any  # bool: the target counts in the loss
    advantages: Any = None  # float32
    sampler_logps: Any = None  # float32, log-probabilities when the target was sampled
    old_logps: Any = None  # float32, log π_old; None: ρ = 1
    ref_logps: Any = None  # float32, log π_ref; None: computed in the step
    labels: Any = None  # float32, of a reward model
    returns: Any = None  # float32, of PPO's critic
    old_values: Any = None  # float32, V(s_t) when the outputs were sampled
    used: Any = None  # int32 []: micro-batches that hold anything
    sequences: Any = None  # int32 []: samples in the whole batch
    loss_tokens: Any = None  # int32 []: unmasked tokens in the whole batch

    def micro(self, index: Any) -> Batch:
        """Returns micro-batch number `index`, whose arrays are [B, T]."""
        take = {
            name: None if value is None else value[index]
            for name in _PER_TOKEN
            for value in [getattr(self, name)]
        }
        return dataclasses.replace(self, **take)

    @property
    def padding(self) -> Any:
        """The share of empty positions in the used micro-batches; 1 if none is used."""
        _, rows, length = self.tokens.shape
        places = (self.used + (self.used == 0)) * rows * length
        return 1 - (self.segment_ids > 0).sum() / places

    def with_capacity(self, capacity: int) -> Batch:
        """Returns the batch padded to `capacity` micro-batches.

        Every batch of a run then has the same shape.

        Raises:
          GrpoError: the batch has more micro-batches than `capacity`.
        """
        missing = capacity - self.tokens.shape[0]
        if missing < 0:
            raise GrpoError(f"pack: {self.tokens.shape[0]} micro-batches > {capacity}")

        def pad(x):
            return None if x is None else np.pad(x, ((0, missing), (0, 0), (0, 0)))

        padded = {name: pad(getattr(self, name)) for name in _PER_TOKEN}
        return dataclasses.replace(self, **padded)


Row = list[list[int]]  # the samples of each prompt in a row


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
    placed = place(samples, length, share, share_prompts, together)
    used = -(-len(placed) // rows)
    spans = _spans(samples, placed, share_prompts)
    arrays = _fill(samples, of[0], spans, (used * rows, length))
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
    for name in ("mask", *_FROM_SAMPLE.values()):
        values = getattr(sample, name)
        if (values is None) != (getattr(first, name) is None):
            raise GrpoError(f"pack: of samples 0 and {i} only one has {name}")
        if hasattr(values, "__len__") and len(values) != n:
            raise GrpoError(
                f"pack: sample {i} has {n} tokens and {len(values)} values of {name}; "
                "one a token is needed"
            )


def row_lengths(longest: int, choices: int) -> list[int]:
    """Returns the lengths that rows may have, from the longest down towards its half.

    >>> row_lengths(1024, 4)
    [1024, 896, 768, 640]
    """
    return [longest - i * longest // (2 * choices) for i in range(choices)]


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
      rows: as in `pack`.
      share_prompts: as in `pack`.
      together: as in `pack`.
      padding: the share of empty positions up to which `longest` is taken.

    >>> samples = [Sample(tokens=[0] * 33, mask=[1] * 33)] * 3
    >>> fitting_length(samples, longest=64), fitting_length(samples, longest=32)
    (34, 32)
    """
    asked = _questions(samples, share_prompts, together)
    shortest = max(question.before + question.own[0] for question in asked)
    positions = sum(question.positions for question in asked)
    best, least = longest, 0
    for length in row_lengths(longest, choices):
        if length < shortest:
            break
        if least and -(-positions // length) * length >= least:
            continue
        placed = place(samples, length, True, share_prompts, together)
        size = -(-len(placed) // rows) * rows * length
        if not least or size < least:
            best, least = length, size
        if length == longest:
            spans = _spans(samples, placed, share_prompts)
            if sum(span.stop - span.first for span in spans) > (1 - padding) * size:
                break
    return best


@dataclasses.dataclass(frozen=True)
class _Question:
    """Samples of one prompt, with the positions that it and each of them take."""

    before: int  # of the shared prompt
    own: list[int]  # of each unit, the longest first
    units: list[range]  # samples that stay together

    @property
    def positions(self) -> int:
        """Positions that the prompt and all its samples take in one row."""
        return self.before + sum(self.own)


def _questions(
    samples: Sequence[Sample], share_prompts: bool, together: int
) -> list[_Question]:
    """Groups samples by prompt, in the order of their longest samples."""
    units: dict[Any, list[range]] = {}
    for start in range(0, len(samples), together):
        first = samples[start]
        prompt = tuple(first.tokens[: first.prompt]) if share_prompts else ()
        units.setdefault(prompt or start, []).append(range(start, start + together))
    found = []
    for of_prompt in units.values():
        before = _prefix(samples[of_prompt[0][0]], share_prompts)
        sized = [
            (sum(len(samples[i].tokens) - 1 - before for i in unit), unit)
            for unit in of_prompt
        ]
        sized.sort(key=lambda pair: -pair[0])
        found.append(_Question(before, *(list(x) for x in zip(*sized, strict=True))))
    return sorted(found, key=lambda question: -question.own[0])


def place(
    samples: Sequence[Sample],
    length: int,
    share: bool = True,
    share_prompts: bool = False,
    together: int = 1,
) -> list[Row]:
    """Assigns samples to rows by first fit, the longest first.

    Outputs of a shared prompt go to the same row as long as there is room. If the rows
    could be fewer, random orders of the questions are tried too, as many as a few
    milliseconds allow. Small batches get the most tries, since a row saves more there.

    Args:
      samples: the sequences to pack.
      length: T, positions of a row.
      share: as in `pack`.
      share_prompts: as in `pack`.
      together: as in `pack`.

    Returns:
      For each row, the indices of its samples, grouped by prompt.

    Raises:
      GrpoError: a sample, or samples that stay together, do not fit a row.
    """
    for i, sample in enumerate(samples):
        if not 2 <= len(sample.tokens) <= length + 1:
            raise GrpoError(
                f"pack: sample {i} has {len(sample.tokens)} tokens; 2 to {length + 1} "
                "fit a row"
            )
    asked = _questions(samples, share_prompts, together)
    for question in asked:
        if question.before + question.own[0] > length:
            raise GrpoError(
                f"pack: {together} samples take {question.before + question.own[0]} "
                f"positions together; {length} fit a row"
            )
    best = _first_fit(asked, length, share)
    least = -(-sum(question.positions for question in asked) // length)
    orders = min(64, 2**18 // max(len(samples), 1) ** 2)
    order = np.random.default_rng(0)  # the same samples always get the same rows
    for _ in range(1, orders if share and share_prompts else 1):
        if len(best) <= least:
            break
        shuffled = [asked[i] for i in order.permutation(len(asked))]
        best = min(best, _first_fit(shuffled, length, share), key=len)
    return best


def _first_fit(asked: list[_Question], length: int, share: bool) -> list[Row]:
    rows: list[Row] = []
    room: list[int] = []
    for question in asked:
        here: dict[int, list[int]] = {}  # the rows with this prompt
        for need, unit in zip(question.own, question.units, strict=True):
            number = next((n for n in here if need <= room[n]), None)
            if number is None:
                need += question.before
                fits = (n for n, space in enumerate(room) if share and need <= space)
                number = next(fits, len(rows))
                if number == len(rows):
                    rows.append([])
                    room.append(length)
                here[number] = []
                rows[number].append(here[number])
            here[number] += unit
            room[number] -= need
    return rows


def _prefix(sample: Sample, share_prompts: bool) -> int:
    """Positions of a shared prompt; its last token belongs to each output's segment."""
    return max(sample.prompt - 1, 0) if share_prompts else 0


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
      share: as in `pack`.
      share_prompts: as in `pack`.
      together: as in `pack`.

    Returns:
      An array [n - 1] for each sample.

    >>> samples = [Sample(tokens=[5, 6], mask=[0, 1]),
    ...            Sample(tokens=[7, 8, 9], mask=[0, 1, 1])]
    >>> [x.tolist() for x in unpack(pack(samples, length=4).targets, samples)]
    [[6], [8, 9]]
    """
    values = np.asarray(values)
    rows = values.reshape(-1, values.shape[-1])
    placed = place(samples, rows.shape[1], share, share_prompts, together)
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
            first = _prefix(samples[members[0]], share_prompts)
            if first:
                yield _Span(row, at, members, 0, first, base)
            at += first
            for i in members:
                segment += 1
                stop = len(samples[i].tokens) - 1
                yield _Span(row, at, [i], first, stop, base + segment)
                at += stop - first


def _fill(samples, like, spans: Iterator[_Span], shape) -> dict[str, np.ndarray]:
    arrays = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "targets", "positions", "segment_ids")
    }
    arrays["mask"] = np.zeros(shape, bool)
    extra = {k: v for k, v in _FROM_SAMPLE.items() if getattr(like, v) is not None}
    arrays |= {name: np.zeros(shape, np.float32) for name in extra}
    for span in spans:
        sample, first, stop = samples[span.of[0]], span.first, span.stop
        here = (span.row, slice(span.start, span.start + stop - first))
        arrays["tokens"][here] = sample.tokens[first:stop]
        arrays["targets"][here] = sample.tokens[first + 1 : stop + 1]
        arrays["positions"][here] = np.arange(first, stop)
        arrays["segment_ids"][here] = span.segment
        arrays["mask"][here] = sample.mask[first + 1 : stop + 1]
        for name, field in extra.items():
            numbers = np.asarray(getattr(sample, field), np.float32)
            part = numbers[first + 1 : stop + 1] if numbers.ndim else numbers
            arrays[name][here] = part
    return arrays
