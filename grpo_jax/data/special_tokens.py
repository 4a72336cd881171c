"""Flags and finds special tokens, and finds the token that ends a chat turn.

All functions take a tokenizer of the `tokenizers` package.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping

import tokenizers

from grpo_jax.data import chat_templates
from grpo_jax.errors import GrpoError


def special_token_pattern(
    tokenizer: tokenizers.Tokenizer, *, special: bool = True
) -> re.Pattern[str]:
    """Returns a pattern that matches the text of any special token.

    Args:
      tokenizer: the tokenizer.
      special: if false, match every added token, special or not.
    """
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
    """Flags tokens as special, as transformers does with eos_token and the like.

    Some files list eos_token as an ordinary word. A question could then contain it,
    and a decoded answer would show it.

    Args:
      tokenizer: the tokenizer, changed in place.
      names: the texts of the tokens; None and unknown texts are skipped.
      added_only: flag only tokens that were added to the vocabulary.
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


def end_of_turn_ids(
    tokenizer: tokenizers.Tokenizer,
    template: str | None,
    special_tokens: Mapping[str, str],
    now: datetime.datetime,
) -> list[int]:
    """Returns the id of the token that a chat template writes after an answer.

    A model trained on such chats ends its turns with it, whatever eos_token says. The
    token is also flagged as special.

    Args:
      tokenizer: the tokenizer, changed in place.
      template: the chat template, or None.
      special_tokens: eos_token, bos_token … as text, for the template.
      now: the time that the template's clock shows.

    Returns:
      A list with the id, or [] if there is no such token.
    """
    if template is None:
        return []
    answer = chat_templates.mark_end({"role": "assistant", "content": "2"})
    chat = [{"role": "user", "content": "1+1=?"}, answer]
    try:
        (rendered,) = chat_templates.render_marked(
            template, special_tokens, [(chat, False)], now
        )
    except GrpoError:  # raised again when a chat is rendered
        return []
    after = rendered.text[rendered.ends[-1] :] if rendered.ends else ""
    for found in special_token_pattern(tokenizer, special=False).finditer(after):
        name = found[0]
        # An added token that is not special may be any word, so it counts only
        # directly after the answer.
        first = name.strip() and not after[: found.start()].strip()
        if first or special_token_pattern(tokenizer).fullmatch(name):
            flag_special(tokenizer, [name])
            return [i for i in [tokenizer.token_to_id(name)] if i is not None]
    return []
