"""Questions with their answers, indexed by training step.

In: the name of a set ("gsm8k", "math", "gsm8k+math"), of a procedural task
("sums/…") or of a local JSON-lines file, and a split.
Out: `Dataset`, a random-access sequence of `Example`; `Batches`, which gives the
examples of any step without having gone through the steps before it.

`datasets.py` reads, downloads and prepares the files (TFDS, Grain).
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, overload

from grpo_jax.data.example import Example, Indexed
from grpo_jax.errors import GrpoError

T = TypeVar("T")


class Dataset(Sequence[Example]):
    """Sequences of examples, one after the other, as one random-access sequence.

    >>> both = Dataset("both", [[Example("a", "1")], [Example("b", "2")]])
    >>> len(both), both[1].question, [e.answer for e in both]
    (2, 'b', ['1', '2'])
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Indexed[Example]],
        *,
        limit: int | None = None,
    ):
        self.name = name
        self._parts = list(parts)
        lengths = (len(part) for part in self._parts)
        if limit is not None:  # of each part
            lengths = (min(length, limit) for length in lengths)
        self._ends = list(itertools.accumulate(lengths))
        if not self._ends or not self._ends[-1]:
            raise GrpoError(f"data {name!r}: the set is empty; give one with rows")

    @property
    def digest(self) -> list[str]:
        """Of each part what its rows were read from, such as a file's SHA-256."""
        return [getattr(part, "digest", "") or repr(part) for part in self._parts]

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative indices; IndexError outside
        part = bisect.bisect_right(self._ends, index)
        start = self._ends[part - 1] if part else 0
        return self._parts[part][index - start]

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} examples)"


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    require: Sequence[str] = (),
) -> Dataset:
    """The examples of a set, decoded one by one when they are asked for.

    name: gsm8k, math, math500, cmath, mgsm_zh (en, de, es, fr, ja), svamp, mawps,
    gsm_hard, gaokao_mathcloze, gaokao_mathqa, ocw, sat, mmlu_stem, sums/…, or the
    path of a `.jsonl` file; "a+b" puts sets one after the other.
    A file's rows hold `question` with `answer` and/or `solution`, or chat
    `messages`; a file has no splits, so `split` is not looked at.
    data_dir: where the original files lie; by default $GRPO_JAX_DATA. A file that
    is not there is downloaded. limit: only the first rows of each set.
    require: fields that no row may leave empty: ("answer",) for grading,
    ("solution",) for SFT.
    Raises GrpoError for a set that is unknown or empty and for a row that cannot be
    used, with file and line.

    >>> load("gms8k", "test")
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: data 'gms8k': no such set; did you mean 'gsm8k'? ...
    """
    if limit is not None and limit < 1:
        raise GrpoError(f"data {name!r}: limit {limit} is below 1; leave it out")
    names = [name] if os.path.isfile(name) else name.split("+")
    parts: list[Indexed[Example]] = []
    for part in (n.strip() for n in names):
        if part.startswith("sums/"):
            from grpo_jax.data import chain_sums

            examples: Indexed[Example] = chain_sums.load(part, split)
        else:
            from grpo_jax.data import prepared_sets  # TFDS: a second to import

            examples = prepared_sets.load(
                part, split, data_dir=data_dir, require=require
            )
        parts.append(examples)
    return Dataset(name, parts, limit=limit)


class Batches(Generic[T]):
    """The batch of every step: a fresh shuffle each epoch, the same on all machines.

    dataset: any sequence; batch_size: rows of a batch. Every process of a run finds a
    step's rows by its number alone, however many there are (`hosts.py`).
    Raises GrpoError if there are fewer rows than one batch holds.

    >>> batches = Batches(range(4), 2, seed=0)
    >>> sorted(batches[0] + batches[1]), sorted(batches[2] + batches[3])
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """

    def __init__(self, dataset: Indexed[T], batch_size: int, *, seed: int):
        import grain  # a second to import

        if batch_size < 1:
            raise GrpoError(f"batch of {batch_size} rows: 1 or more are needed")
        if len(dataset) < batch_size:
            name = f" {dataset.name!r}" if isinstance(dataset, Dataset) else ""
            raise GrpoError(
                f"data{name}: {len(dataset)} rows are fewer "
                f"than one batch of {batch_size}; give more data or a smaller batch"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        order: Any = grain.MapDataset.range(len(dataset)).seed(seed % 2**32)
        self._order = order.shuffle().repeat()  # reshuffles in each epoch

    def __getitem__(self, step: int) -> list[T]:
        if step < 0:
            raise IndexError(f"step {step} is negative")
        start = step * self.batch_size
        return [self.dataset[self._order[start + i]] for i in range(self.batch_size)]
