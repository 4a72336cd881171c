"""The procedural task: chain sums with a worked solution, in four variants.

`load_chain_sums` returns a sequence of `Example`. Each example is computed from its
index, so the task needs no file and no download. "sums/tool-chain" has the questions of
"sums/chain", solved by a program.

A hash of a problem's terms decides whether it belongs to train or test. A test problem
is therefore never trained on in another wording.
"""

from __future__ import annotations

import hashlib
import random
import string

from grpo_jax.data.example import Example, Indexed
from grpo_jax.errors import GrpoError

ALPHABET = "0123456789+-=?# \n,.Sabdefhikmnorstuwy加减等于几从开始"
# The alphabet with the characters of programs and their outputs.
TOOL_ALPHABET = "".join(dict.fromkeys(ALPHABET + string.printable[:95]))
LARGEST = 19  # the largest absolute value of a term
# The smallest and largest number of terms.
LENGTHS = {"chain": (2, 3), "long": (4, 4), "words": (2, 3), "zh": (2, 3)}
_SIZES = {"train": 20_000, "test": 5_000}

Terms = tuple[int, ...]


def load_chain_sums(name: str, split: str) -> Indexed[Example]:
    """Returns the examples of sums/chain, sums/long, sums/words or sums/zh.

    Args:
      name: the variant; "sums/tool-…" has solutions by a program.
      split: "train" or "test".

    Raises:
      GrpoError: there is no such variant or split.

    >>> load_chain_sums("sums/chain", "test")[0].question
    '6+3-2=?'
    >>> load_chain_sums("sums/tool-chain", "test")[0].question
    '6+3-2=?'
    """
    variant = name.removeprefix("sums/")
    if variant.removeprefix("tool-") not in LENGTHS:
        known = ", ".join(f"sums/{v}" for v in LENGTHS)
        raise GrpoError(
            f"data {name!r}: no such set; there are {known}, and sums/tool-chain …"
        )
    if split not in _SIZES:
        raise GrpoError(f"data {name!r}: no split {split!r}; there are train and test")
    return _Sums(variant, split)


class _Sums:
    def __init__(self, variant: str, split: str):
        self.digest = f"{variant}/{split}"  # determines all rows
        self.variant, self.split = variant.removeprefix("tool-"), split
        tool = variant != self.variant
        self.solve = write_program_solution if tool else write_solution

    def __len__(self) -> int:
        return _SIZES[self.split]

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        name = f"{self.variant}/{self.split}/{index}"
        terms = _draw_terms(
            random.Random(name), LENGTHS[self.variant], self.split == "test"
        )
        return Example(
            question=_phrase_question(terms, self.variant),
            answer=str(sum(terms)),
            solution=self.solve(terms),
            language="zh" if self.variant == "zh" else "en",
            id=f"sums/{name}",
        )


def _draw_terms(rng: random.Random, lengths: tuple[int, int], held_out: bool) -> Terms:
    """Draws signed terms of the given split; the running sums are never negative."""
    while True:
        terms = [rng.randint(1, LARGEST)]
        for _ in range(rng.randint(*lengths) - 1):
            term = rng.randint(1, LARGEST)
            terms.append(-term if rng.random() < 0.5 and sum(terms) >= term else term)
        if is_held_out(tuple(terms)) == held_out:
            return tuple(terms)


def is_held_out(terms: Terms) -> bool:
    """Returns whether a problem belongs to the test split; about a tenth do."""
    return hashlib.blake2b(repr(terms).encode()).digest()[0] % 10 == 0


def write_solution(terms: Terms) -> str:
    """Returns the chain of thought: the running sums, then the answer.

    >>> print(write_solution((12, 7, -5)))
    12+7=19
    19-5=14
    #### 14
    """
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{total}{term:+d}={total + term}")
        total += term
    return "\n".join([*lines, f"#### {total}"])


def write_program_solution(terms: Terms) -> str:
    """Returns a solution by a program and its output.

    >>> print(write_program_solution((12, -5)))
    ```python
    print(12-5)
    ```
    ```output
    7
    ```
    #### 7
    """
    program, total = f"```python\nprint({_sum(terms)})\n```", sum(terms)
    return f"{program}\n```output\n{total}\n```\n#### {total}"


def _sum(terms: Terms) -> str:
    return f"{terms[0]}" + "".join(f"{t:+d}" for t in terms[1:])


def _phrase_question(terms: Terms, variant: str) -> str:
    """Returns the question of a problem in the words of a variant."""
    if variant == "words":
        steps = [f"{'add' if t > 0 else 'take away'} {abs(t)}" for t in terms[1:]]
        return f"Start with {terms[0]}, {', '.join(steps)}."
    if variant == "zh":
        steps = [f"{'加' if t > 0 else '减'}{abs(t)}" for t in terms[1:]]
        return f"从{terms[0]}开始{''.join(steps)}等于几?"
    return f"{_sum(terms)}=?"
