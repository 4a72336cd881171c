"""Datasets of questions with answers, and their batches by training step.

`load_dataset` opens a public set, the procedural task ("sums/…") or a local JSON-lines
file as a `Dataset`, a random-access sequence of `Example`. `Batches` returns the
examples of any training step without reading the steps before it.

`prepared_sets.py` finds, downloads and prepares the files.
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
    """Concatenates sequences of examples into one random-access sequence.

    Args:
      name: the set's name, for messages.
      parts: the sequences, in order.
      limit: use only the first `limit` examples of each part.

    Raises:
      GrpoError: the dataset is empty.

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
        if limit is not None:  # applies to each part
            lengths = (min(length, limit) for length in lengths)
        self._ends = list(itertools.accumulate(lengths))
        if not self._ends or not self._ends[-1]:
            raise GrpoError(f"data {name!r}: the set is empty; give one with rows")

    @property
    def digest(self) -> list[str]:
        """Identifies the source of each part, for example by a file's SHA-256."""
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


def load_dataset(
    name: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    require: Sequence[str] = (),
) -> Dataset:
    """Returns the examples of a set; each is decoded when it is accessed.

    Args:
      name: gsm8k, math, math500, cmath, mgsm_zh (also en, de, es, fr, ja), svamp,
        mawps, gsm_hard, gaokao_mathcloze, gaokao_mathqa, ocw, sat, mmlu_stem,
        sums/…, or the path of a `.jsonl` file. "a+b" concatenates sets. The rows of
        a file hold `question` with `answer`, `solution` or both, or chat `messages`.
      split: "train" or "test". A file has no splits and ignores it.
      data_dir: the folder of the original files; by default $GRPO_JAX_DATA. A file
        that is missing there is downloaded.
      limit: use only the first `limit` rows of each set.
      require: fields that no row may leave empty: ("answer",) for grading,
        ("solution",) for SFT.

    Raises:
      GrpoError: the set is unknown or empty, or a row is invalid; the message names
        the file and the line.

    >>> load_dataset("gms8k", "test")
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: data 'gms8k': no such set; did you mean 'gsm8k'? ...
    """
    if limit is not None and limit < 1:
        raise GrpoError(f"data {name!r}: limit {limit} is below 1; leave it out")
    parts: list[Indexed[Example]] = []
    for part in split_names(name):
        if part.startswith("sums/"):
            from grpo_jax.data import chain_sums

            examples: Indexed[Example] = chain_sums.load_chain_sums(part, split)
        else:
            from grpo_jax.data import prepared_sets  # TFDS takes a second

            examples = prepared_sets.load_prepared(
                part, split, data_dir=data_dir, require=require
            )
        parts.append(examples)
    return Dataset(name, parts, limit=limit)


def split_names(name: str) -> list[str]:
    """Returns the sets that "a+b" joins; a path of a file may hold a + itself.

    >>> split_names("gsm8k + math")
    ['gsm8k', 'math']
    """
    return [name] if os.path.isfile(name) else [n.strip() for n in name.split("+")]


class Batches(Generic[T]):
    """Returns the batch of a step by its index, with a new shuffle each epoch.

    The order depends only on the seed and the length of the dataset. Every process of
    a run therefore finds the rows of a step by its number, however many processes
    there are.

    Args:
      dataset: any sequence.
      batch_size: rows per batch.
      seed: seeds the shuffles.

    Raises:
      GrpoError: the batch size is below 1 or above the number of rows.

    >>> batches = Batches(range(4), 2, seed=0)
    >>> sorted(batches[0] + batches[1]), sorted(batches[2] + batches[3])
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """

    def __init__(self, dataset: Indexed[T], batch_size: int, *, seed: int):
        import grain  # the import takes a second

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
