"""One question with what is known about its answer; what every data source yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item", covariant=True)


class Indexed(Protocol[Item]):
    """What has a length and gives the item at an index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One question q with what is known about its answer.

    >>> Example("What is 2 + 3?", answer="5").language
    'en'
    """

    question: str
    answer: str = ""  # the short final answer, which a completion is graded against
    solution: str = ""  # the worked text, which SFT imitates
    language: str = "en"  # chooses the instruction: "zh" the Chinese one
    id: str = ""
    # further fields, handed on to the reward functions (level, subject, options …)
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
