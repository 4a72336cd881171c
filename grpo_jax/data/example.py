"""The example that every data source yields: a question and its known answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item", covariant=True)


class Indexed(Protocol[Item]):
    """A sequence with a length and random access by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One question q with its reference answer, its worked solution, or both.

    >>> Example("What is 2 + 3?", answer="5").language
    'en'
    """

    question: str
    answer: str = ""  # the short final answer that completions are graded against
    solution: str = ""  # the worked solution that SFT imitates
    language: str = "en"  # selects the prompt's instruction: Chinese for "zh"
    id: str = ""
    # Further fields, passed on to the reward functions (level, subject, options …).
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
