"""The embedded task: chain sums with a worked solution, in four variants.

In: a variant's name ("sums/chain") and a split. Out: a sequence of `Example`, made one
by one from its index: no file, no download, no state. "sums/tool-chain" has the same
questions, solved by a program.

A problem (its terms and signs, whatever the wording) belongs to train or to test by a
hash of itself, so no test problem was ever trained on in another wording.
"""

from __future__ import annotations

import hashlib
import random
import string

from grpo_jax.data.example import Example, Indexed
from grpo_jax.errors import GrpoError

ALPHABET = "0123456789+-=?# \n,.Sabdefhikmnorstuwy加减等于几从开始"
# The same, and what programs and interpreters write.
TOOL_ALPHABET = "".join(dict.fromkeys(ALPHABET + string.printable[:95]))
LARGEST = 19  # of a term
LENGTHS = {"chain": (2, 3), "long": (4, 4), "words": (2, 3), "zh": (2, 3)}
_SIZES = {"train": 20_000, "test": 5_000}

Terms = tuple[int, ...]


def load(name: str, split: str) -> Indexed[Example]:
    """The examples of sums/chain (in-domain), sums/long, sums/words or sums/zh.

    >>> load("sums/chain", "test")[0].question
    '6+3-2=?'
    >>> load("sums/tool-chain", "test")[0].question
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
        self.digest = f"{variant}/{split}"  # its rows follow from that
        self.variant, self.split = variant.removeprefix("tool-"), split
        self.solve = solve if variant == self.variant else solve_by_program

    def __len__(self) -> int:
        return _SIZES[self.split]

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        name = f"{self.variant}/{self.split}/{index}"
        terms = _draw(random.Random(name), LENGTHS[self.variant], self.split == "test")
        return Example(
            question=_WORDINGS[self.variant](terms),
            answer=str(sum(terms)),
            solution=self.solve(terms),
            language="zh" if self.variant == "zh" else "en",
            id=f"sums/{name}",
        )


def _draw(rng: random.Random, lengths: tuple[int, int], held_out: bool) -> Terms:
    """Signed terms whose running sums stay at 0 or above, of the split asked for."""
    while True:
        terms = [rng.randint(1, LARGEST)]
        for _ in range(rng.randint(*lengths) - 1):
            term = rng.randint(1, LARGEST)
            terms.append(-term if rng.random() < 0.5 and sum(terms) >= term else term)
        if is_held_out(tuple(terms)) == held_out:
            return tuple(terms)


def is_held_out(terms: Terms) -> bool:
    """Whether a problem is a test problem: a tenth of all are."""
    return hashlib.blake2b(repr(terms).encode()).digest()[0] % 10 == 0


def solve(terms: Terms) -> str:
    """The chain of thought: running sums, then the answer.

    >>> print(solve((12, 7, -5)))
    12+7=19
    19-5=14
    #### 14
    """
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{total}{term:+d}={total + term}")
        total += term
    return "\n".join([*lines, f"#### {total}"])


def solve_by_program(terms: Terms) -> str:
    """The same with a program and its output.

    >>> print(solve_by_program((12, -5)))
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


def _chain(terms: Terms) -> str:
    return f"{_sum(terms)}=?"


def _words(terms: Terms) -> str:
    steps = [f"{'add' if t > 0 else 'take away'} {abs(t)}" for t in terms[1:]]
    return f"Start with {terms[0]}, " + ", ".join(steps) + "."


def _zh(terms: Terms) -> str:
    steps = "".join(f"{'加' if t > 0 else '减'}{abs(t)}" for t in terms[1:])
    return f"从{terms[0]}开始{steps}等于几?"


_WORDINGS = {"chain": _chain, "long": _chain, "words": _words, "zh": _zh}
