r"""Finds the last token of each step of an output.

A process reward model is read at these tokens (section 4.1.3). A step is a line with
visible text; empty lines are not steps. A step ends at the token whose text contains
the line break, which the tokenizer may have merged with other text ("\n\n", ".\n"). The
output's last token, EOS or not, ends the last step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from grpo_jax.data.tokenizer import Tokenizer


def step_ends(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    r"""Returns the index of each step's last token, in order; [] for no tokens.

    >>> tokenizer = Tokenizer.from_alphabet("ab\n")
    >>> tokens = [*tokenizer.encode("a\n\nab\n"), tokenizer.eos_id]
    >>> step_ends(tokenizer, tokens)
    [1, 6]
    """
    ends: list[int] = []
    visible = False  # whether the step that is open has visible text
    for i, token in enumerate(tokens):
        before, newline, after = _text(tokenizer, int(token)).rpartition("\n")
        if not newline:
            visible = visible or bool(after.strip())
            continue
        if visible or before.strip():
            ends.append(i)
        visible = bool(after.strip())
    if len(tokens):
        # EOS or white space alone still belongs to the step before.
        if ends and (not visible or ends[-1] == len(tokens) - 1):
            ends.pop()
        ends.append(len(tokens) - 1)
    return ends


@functools.lru_cache(1 << 18)
def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token])
