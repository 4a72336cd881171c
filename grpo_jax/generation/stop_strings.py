"""Stop strings, found in the text, however a tokenizer splits it.

In: a tokenizer and strings. Out: a table that a compiled loop reads: what a token makes
of how much of a string stood before it.

"```output" may come as ["```", "output"], ["`", "``out", "put"] or within a token that
goes on after it; sequences of token ids name one of these. The table is the automaton
of Aho and Corasick (1975) over the characters of each token: exact, one look-up a turn.

Axes: V token ids, S states (beginnings of the strings, "" first; the last: found).
"""

from __future__ import annotations

import functools

import numpy as np

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError


@functools.lru_cache(8)
def stop_table(
    tokenizer: Tokenizer, strings: tuple[str, ...], rows: int = 0
) -> np.ndarray:
    """[V, S] int32: the state after a token, for each state before it.

    State 0 has nothing of a string, the last has seen one, whatever came after it. A
    token without a text (a special one) changes nothing. rows: V at least, for models
    whose embedding is larger than their vocabulary.

    >>> tokenizer = Tokenizer.from_alphabet("ab")  # 3 and 4, after the special ones
    >>> stop_table(tokenizer, ("aab",))[3:].tolist()
    [[1, 2, 2, 3], [0, 0, 3, 3]]
    """
    if not strings or not all(strings):
        raise GrpoError("stop_table: give strings with a character each, at least")
    states = [""]  # the beginnings, the shorter ones first
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
    texts = tokenizer.texts()
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
