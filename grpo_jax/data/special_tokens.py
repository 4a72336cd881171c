"""Which tokens are special, and which of them ends a turn of a chat.

In: a tokenizer of the `tokenizers` package, what its folder names, a chat template.
Out: tokens flagged, a pattern of their texts, the id of the turn's end.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping

import tokenizers

from grpo_jax.data import chat_templates
from grpo_jax.errors import GrpoError


def pattern(
    tokenizer: tokenizers.Tokenizer, *, special: bool = True
) -> re.Pattern[str]:
    """Matches the special tokens, or all that were added to the vocabulary."""
    added = tokenizer.get_added_tokens_decoder().values()
    names = {t.content for t in added if t.special or not special}
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def flag_special(
    tokenizer: tokenizers.Tokenizer,
    names: Iterable[str | None],
    *,
    added_only: bool = False,
) -> None:
    """Makes tokens of the vocabulary special, as transformers does with named ones.

    Some files list eos_token as an ordinary word: then a question could write it, and
    an answer would show it.
    """
    added = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
    for name in names:
        token = added.get(name or "")
        if token is None and name and not added_only:
            if tokenizer.token_to_id(name) is not None:
                token = tokenizers.AddedToken(name, normalized=False)
        if token is not None and not token.special:
            token.special = True
            tokenizer.add_special_tokens([token])


def turn_end(
    tokenizer: tokenizers.Tokenizer,
    template: str | None,
    special_tokens: Mapping[str, str],
    now: datetime.datetime,
) -> list[int]:
    """The token that a chat template puts behind an answer; [] where it has none.

    A model of such chats ends its turns with it, whatever eos_token says.
    """
    if template is None:
        return []
    answer = chat_templates.ended({"role": "assistant", "content": "2"})
    chat = [{"role": "user", "content": "1+1=?"}, answer]
    try:
        (told,) = chat_templates.render(template, special_tokens, [(chat, False)], now)
    except GrpoError:  # raised where a chat is rendered, if one ever is
        return []
    after = told.text[told.ends[-1] :] if told.ends else ""
    for found in pattern(tokenizer, special=False).finditer(after):
        name = found[0]
        # One that no file calls special may be any word; but not right here.
        first = name.strip() and not after[: found.start()].strip()
        if first or pattern(tokenizer).fullmatch(name):
            flag_special(tokenizer, [name])
            return [i for i in [tokenizer.token_to_id(name)] if i is not None]
    return []
