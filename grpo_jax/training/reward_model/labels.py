"""Step-labelled sequences, the training data of a reward model.

A sequence has a label in [0, 1] at each step's last token. `math_shepherd.py` makes
them, or `read_math_shepherd` reads published ones. They are kept as JSON lines;
`mix_with_history` mixes new and old ones for iterative GRPO (section 4.1.4).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.data.parsers import check_text, json_lines
from grpo_jax.errors import GrpoError
from grpo_jax.files import write_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledSequence:
    """A question's prompt and one output, with a label for each step.

    Raises:
      GrpoError: step ends do not rise within the output, or a label is not in [0, 1].
    """

    tokens: tuple[int, ...]  # prompt and output
    prompt: int  # how many of them are the prompt
    ends: tuple[int, ...]  # the index in `tokens` of each step's last token, rising
    labels: tuple[float, ...]  # of each step; the last is the whole output's
    id: str = ""  # of the question

    def __post_init__(self):
        ends, n = self.ends, len(self.tokens)
        if len(ends) != len(self.labels) or not ends:
            raise GrpoError(f"{len(ends)} step ends and {len(self.labels)} labels")
        rising = all(a < b for a, b in zip(ends, ends[1:], strict=False))
        if not (rising and 0 <= self.prompt <= ends[0] and ends[-1] < n):
            raise GrpoError(
                f"step ends {list(ends)} do not rise from the prompt's end "
                f"{self.prompt} to below {n} tokens"
            )
        if not all(0 <= label <= 1 for label in self.labels):
            raise GrpoError(f"labels {list(self.labels)} are not all in [0, 1]")

    def outcome(self) -> LabelledSequence:
        """Returns the sequence with its last label only, for outcome reward models."""
        return dataclasses.replace(self, ends=self.ends[-1:], labels=self.labels[-1:])


def write_labels(
    path: str | os.PathLike[str], items: Sequence[LabelledSequence]
) -> None:
    """Writes one JSON line for each sequence; the file appears whole or not at all."""
    lines = (json.dumps(dataclasses.asdict(i), ensure_ascii=False) for i in items)
    write_whole(path, "".join(line + "\n" for line in lines))


def read_labels(
    path: str | os.PathLike[str], *, vocab_size: int | None = None
) -> list[LabelledSequence]:
    """Reads a file of `write_labels`.

    Args:
      path: the file.
      vocab_size: raise for token ids that this vocabulary does not have.

    Raises:
      GrpoError: a line, whose number the message has, is damaged; or there is none.
    """
    known = range(2**31 if vocab_size is None else vocab_size)

    def labelled(row: dict[str, Any]) -> LabelledSequence:
        item = LabelledSequence(
            tokens=_values(row, "tokens", int),
            prompt=_value(row, "prompt", int),
            ends=_values(row, "ends", int),
            labels=_values(row, "labels", int, float),
            id=_value(row, "id", str),
        )
        if unknown := [token for token in item.tokens if token not in known]:
            raise ValueError(
                f"token {unknown[0]} is not one of this tokenizer's {len(known)}; "
                "label with the model that you train"
            )
        return item

    items = [item for _, item in read_rows(path, labelled)]
    if not items:
        raise GrpoError(f"{path}: no labelled sequence in it")
    return items


def _values(row: dict[str, Any], key: str, *kinds: type) -> tuple[Any, ...]:
    values = row[key] if isinstance(row[key], list) else [None]
    return tuple(_value({key: value}, key, *kinds) for value in values)


def _value(row: dict[str, Any], key: str, *kinds: type) -> Any:
    if type(row[key]) not in kinds:  # a bool is no number
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"field {key!r} does not hold {names}")
    return row[key]


def mix_with_history(
    new: Sequence[LabelledSequence],
    history: Sequence[LabelledSequence],
    *,
    seed: int,
    iteration: int,
    share: float = 0.1,
) -> list[LabelledSequence]:
    """Returns the new sequences and a share of the history (section 4.1.4).

    The paper's "10 % of historical data" is read as a tenth of the history.

    Args:
      new: sequences of this iteration.
      history: sequences of all earlier iterations.
      seed: together with `iteration`, of the draw without replacement.
      iteration: the iteration's number.
      share: of the history that is drawn.

    >>> old = [LabelledSequence(tokens=(i,), prompt=0, ends=(0,), labels=(1.0,))
    ...        for i in range(20)]
    >>> len(mix_with_history(old[:5], old, seed=0, iteration=1))
    7
    """
    count = round(share * len(history))
    generator = np.random.default_rng([seed, iteration])
    indices = np.sort(generator.choice(len(history), count, replace=False))
    return [*new, *(history[i] for i in indices.tolist())]


# -- worked solutions as text ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Solution:
    """A question with labelled steps as text."""

    question: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    id: str = ""  # of the question


def encode_solution(
    tokens_of: Callable[[str], list[int]], solution: Solution
) -> LabelledSequence:
    r"""Returns a solution as tokens, with question and steps on lines of their own.

    Each is encoded separately, so that a step's last token holds its line break.

    Args:
      tokens_of: encodes a text.
      solution: the question and its labelled steps.

    >>> solution = Solution("1+1?", ("1+1=2", "2"), (1.0, 1.0))
    >>> item = encode_solution(lambda text: list(text.encode()), solution)
    >>> item.prompt, item.ends, len(item.tokens)
    (5, (10, 12), 13)
    """
    tokens = tokens_of(solution.question + "\n")
    prompt, ends = len(tokens), []
    for step in solution.steps:
        tokens += tokens_of(step + "\n")
        ends.append(len(tokens) - 1)
    return LabelledSequence(
        tokens=tuple(tokens),
        prompt=prompt,
        ends=tuple(ends),
        labels=solution.labels,
        id=solution.id,
    )


_MARK = "ки"  # ends a step in Math-Shepherd's `input`; `label` has + or - instead


def read_math_shepherd(path: str | os.PathLike[str]) -> list[Solution]:
    """Reads the published Math-Shepherd format (Wang et al. 2023), JSON lines.

    A row has `input`, whose steps end with "ки", and `label`, the same text with + or -
    in its place.

    Raises:
      GrpoError: a row's two texts differ in more than these marks.
    """

    def solution(row: dict[str, Any]) -> Solution:
        texts = (_value(row, name, str) for name in ("input", "label"))
        question, steps, labels = _split_at_marks(*texts)
        name = hashlib.blake2b(question.encode(), digest_size=8).hexdigest()
        return Solution(question, steps, labels, name)

    return [item for _, item in read_rows(path, solution)]


def _split_at_marks(
    text: str, label: str
) -> tuple[str, tuple[str, ...], tuple[float, ...]]:
    *parts, rest = text.split(_MARK)
    if rest.strip() or not parts:
        raise ValueError(f"`input` does not end with {_MARK!r}")
    question, first, _ = parts[0].partition("Step 1:")
    if not first:
        raise ValueError("`input` has no 'Step 1:'")
    labels, at = [], 0
    for part in parts:
        at += len(part)
        if label[:at][-len(part) :] != part or label[at : at + 1] not in ("+", "-"):
            raise ValueError(f"`label` has no + or - after {part.strip()[-40:]!r}")
        labels.append(float(label[at] == "+"))
        at += 1
    parts[0] = parts[0][len(question) :]
    return question.strip(), tuple(p.strip() for p in parts), tuple(labels)


def read_rows(
    path: str | os.PathLike[str], convert: Callable[[dict[str, Any]], Any] = dict
) -> Iterator[tuple[int, Any]]:
    """Yields (line number, converted object) of a JSON-lines file.

    Args:
      path: the file.
      convert: takes a line's object; a KeyError, TypeError or ValueError that it raises
        gets the file's name and the line's number.

    Raises:
      GrpoError: the file cannot be read, or a line is not an object of valid text or
        cannot be converted.
    """
    try:
        for number, row in json_lines(Path(path)):
            try:
                if not isinstance(row, dict):
                    raise TypeError("expected an object with fields")
                check_text(row)
                item = convert(row)
            except KeyError as error:
                raise GrpoError(f"{path}:{number}: no field {error}") from None
            except (TypeError, ValueError) as error:
                raise GrpoError(f"{path}:{number}: {error}") from None
            yield number, item
    except OSError as error:
        raise GrpoError(f"{path}: cannot be read ({error.strerror})") from None
