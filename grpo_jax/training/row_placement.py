"""Which samples share a row: first fit, the longest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.errors import GrpoError
from grpo_jax.training.batch import Sample

Row = list[list[int]]  # the samples of each prompt in a row


def row_lengths(longest: int, choices: int) -> list[int]:
    """Returns the lengths that rows may have, from the longest down towards its half.

    >>> row_lengths(1024, 4)
    [1024, 896, 768, 640]
    """
    return [longest - i * longest // (2 * choices) for i in range(choices)]


@dataclasses.dataclass(frozen=True)
class PromptGroup:
    """Samples of one prompt, with the positions that it and each of them take."""

    before: int  # of the shared prompt
    # (positions, samples that stay together), the longest first
    units: list[tuple[int, range]]

    @property
    def longest(self) -> int:
        """Positions of the prompt with its longest unit."""
        return self.before + self.units[0][0]

    @property
    def positions(self) -> int:
        """Positions that the prompt and all its samples take in one row."""
        return self.before + sum(need for need, _ in self.units)


def group_by_prompt(
    samples: Sequence[Sample], share_prompts: bool, together: int
) -> list[PromptGroup]:
    """Groups samples by prompt, in the order of their longest samples."""
    units: dict[Any, list[range]] = {}
    for start in range(0, len(samples), together):
        first = samples[start]
        prompt = tuple(first.tokens[: first.prompt]) if share_prompts else ()
        units.setdefault(prompt or start, []).append(range(start, start + together))
    found = []
    for of_prompt in units.values():
        before = shared_positions(samples[of_prompt[0][0]], share_prompts)
        sized = [
            (sum(len(samples[i].tokens) - 1 - before for i in unit), unit)
            for unit in of_prompt
        ]
        found.append(PromptGroup(before, sorted(sized, key=lambda pair: -pair[0])))
    return sorted(found, key=lambda group: -group.units[0][0])


def place_in_rows(
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
      share, share_prompts, together: as in `pack`.

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
    groups = group_by_prompt(samples, share_prompts, together)
    for group in groups:
        if group.longest > length:
            raise GrpoError(
                f"pack: {together} samples take {group.longest} positions together; "
                f"{length} fit a row"
            )
    best = _first_fit(groups, length, share)
    least = -(-sum(group.positions for group in groups) // length)
    orders = min(64, 2**18 // max(len(samples), 1) ** 2)
    order = np.random.default_rng(0)  # the same samples always get the same rows
    for _ in range(1, orders if share and share_prompts else 1):
        if len(best) <= least:
            break
        shuffled = [groups[i] for i in order.permutation(len(groups))]
        best = min(best, _first_fit(shuffled, length, share), key=len)
    return best


def _first_fit(groups: list[PromptGroup], length: int, share: bool) -> list[Row]:
    rows: list[Row] = []
    room: list[int] = []
    for group in groups:
        here: dict[int, list[int]] = {}  # the rows with this prompt
        for need, unit in group.units:
            number = next((n for n in here if need <= room[n]), None)
            if number is None:
                need += group.before
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


def shared_positions(sample: Sample, share_prompts: bool) -> int:
    """Returns the positions of a shared prompt, which lack its last token."""
    return max(sample.prompt - 1, 0) if share_prompts else 0
