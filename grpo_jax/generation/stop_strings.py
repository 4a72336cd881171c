"""Finds stop strings in sampled text, whatever tokens they are split into.

"```output" may come as ["```", "output"], as ["`", "``out", "put"] or inside a longer
token; a sequence of token ids would match only one of these. The automaton of Aho and
Corasick (1975) over the characters of every token finds them all. As a table it costs
the compiled decode loop one look-up per turn.

Axes: V token ids, S states (prefixes of the strings, "" first; the last is "found").
"""

from __future__ import annotations

import functools

import numpy as np

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError


@functools.lru_cache(8)
def make_stop_table(
    tokenizer: Tokenizer, strings: tuple[str, ...], rows: int = 0
) -> np.ndarray:
    """Returns the table of the state after a token, for each state before it.

    In state 0 no part of a string has been seen. The last state means that a string was
    found, and no token leaves it. Special tokens have no text and keep the state.

    Args:
      tokenizer: the tokenizer, whose tokens' texts are matched.
      strings: the stop strings, none of them empty.
      rows: least V, for models whose embedding is larger than their vocabulary.

    Returns:
      [V, S] int32.

    Raises:
      GrpoError: there are no strings, or one is empty.

    >>> tokenizer = Tokenizer.from_alphabet("ab")  # 3 and 4, after the special ones
    >>> make_stop_table(tokenizer, ("aab",))[3:].tolist()
    [[1, 2, 2, 3], [0, 0, 3, 3]]
    """
    if not strings or not all(strings):
        raise GrpoError("stop_table: give strings with a character each, at least")
    states = [""]  # all proper prefixes, the shorter ones first
    for string in strings:
        states += [string[:n] for n in range(1, len(string))]
    states = sorted(set(states), key=lambda s: (len(s), s))
    number = {state: i for i, state in enumerate(states)}
    found = len(states)
    following: list[dict[str, int]] = [{} for _ in states]
    for state, steps in zip(states, following, strict=True):
        for c in set("".join(strings)):
            seen = state + c
            if any(seen.endswith(string) for string in strings):
                steps[c] = found
                continue
            rest = (seen[i:] for i in range(len(seen) + 1))
            steps[c] = next(number[text] for text in rest if text in number)
    firsts = {string[0] for string in strings}
    texts = tokenizer.token_texts()
    table = np.tile(np.arange(found + 1, dtype=np.int32), (max(rows, len(texts)), 1))
    for i, text in enumerate(texts):
        has_first = not firsts.isdisjoint(text)
        for start in range(found if text else 0):
            state = start
            for c in text:
                state = following[state].get(c, 0)
                if state == found or not (state or has_first):
                    break
            table[i, start] = state
    return table
