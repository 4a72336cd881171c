"""Encodes questions as prompts, and questions with worked answers as SFT rows.

`encode_prompt` returns the token ids of a question q. `encode_sft` returns token ids
and a loss mask. The mask covers the answer and its EOS, but not the prompt and not the
output of a tool.

Templates: "chat" is the model's own (`chat_templates.py`), "deepseekmath" is that of
DeepSeekMath ("User: …\n\nAssistant:"), and "plain" is the question alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from grpo_jax.data.example import Example
from grpo_jax.data.prompt_parts import (
    bos_ids,
    chat_messages,
    render_chats,
    split_parts,
    written_prompt,
)
from grpo_jax.data.sft_answers import split_answer
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError

TOGETHER = 64  # prompts rendered in one request


def encode_prompt(
    tokenizer: Tokenizer,
    question: Example | str,
    *,
    template: str = "chat",
    instruction: str = "cot",
) -> list[int]:
    """Returns the token ids of the prompt q, up to where the model's answer starts.

    Special tokens are parsed only where the template wrote them.

    Args:
      tokenizer: the model's tokenizer.
      question: an example, or the text of a question.
      template: "chat", "deepseekmath" or "plain".
      instruction: "cot", "tool" or "none"; see `prompt_content`.

    Raises:
      GrpoError: the template or the instruction is unknown or does not fit the
        example, or the prompt is empty.

    >>> from grpo_jax.data.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.from_alphabet("12+=")
    >>> encode_prompt(tokenizer, Example("1+2="), template="plain", instruction="none")
    [3, 5, 4, 6]
    """
    example = Example(question) if isinstance(question, str) else question
    return _encode(tokenizer, [example], template, instruction)[0]


def _encode(
    tokenizer: Tokenizer, examples: Sequence[Example], template: str, instruction: str
) -> list[list[int]]:
    """Returns the prompt ids of several examples; chats are rendered together."""
    if template == "chat":
        chats = [(chat_messages(tokenizer, e, instruction), True) for e in examples]
        every = [
            split_parts(tokenizer, rendered, 0, len(rendered.text))
            for rendered in render_chats(tokenizer, chats, row=examples[0].id)
        ]
    else:
        every = [written_prompt(tokenizer, e, template, instruction) for e in examples]
    bos, found = bos_ids(tokenizer, template), []
    for example, parts in zip(examples, every, strict=True):
        found.append(bos + tokenizer.encode_parts(parts)[0])
        if not found[-1]:
            raise GrpoError(
                f"data {example.id!r}: its prompt is empty by the template {template}; "
                "change data.template or the row"
            )
    return found


def encode_sft(
    tokenizer: Tokenizer,
    example: Example,
    *,
    template: str = "chat",
    instruction: str = "cot",
) -> tuple[list[int], list[int]]:
    """Returns the token ids and the loss mask of a question with its worked answer.

    Args: as for `encode_prompt`.

    Returns:
      tokens: exactly the ids of `encode_prompt`, then the solution (or the answer, if
        there is no solution), then the EOS.
      loss_mask: one int per token: 1 on the solution and the EOS, 0 on the prompt and
        on what a tool wrote after "```output". All 0 without solution and answer.

    >>> from grpo_jax.data.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.from_alphabet("12+=3")
    >>> encode_sft(tokenizer, Example("1+2=", answer="3"), template="plain",
    ...            instruction="none")
    ([3, 5, 4, 6, 7, 2], [0, 0, 0, 0, 1, 1])
    """
    target = example.solution or example.answer
    if not target.strip():
        ids = encode_prompt(
            tokenizer, example, template=template, instruction=instruction
        )
        return ids, [0] * len(ids)
    prompt, answer = split_answer(tokenizer, example, template, instruction, target)
    prompt_ids = tokenizer.encode_parts(prompt)[0]
    # Encode the answer after its prompt, as some tokenizers add a space at the start
    # of a text. Encode it alone if prompt and answer would merge into one token.
    ids, offsets = tokenizer.encode_parts([*prompt, *answer.parts])
    start = sum(len(text) for text, _ in prompt)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids, offsets = ids[len(prompt_ids) :], offsets[len(prompt_ids) :]
    else:
        ids, offsets = tokenizer.encode_parts(answer.parts)
        start = 0
    mask = [1] * len(ids)
    if answer.tools or answer.gaps:
        mask = [int(answer.learned(a - start, b - start)) for a, b in offsets]
    if not answer.closed:
        ids, mask = [*ids, tokenizer.eos_id], [*mask, 1]
    prompt_ids = bos_ids(tokenizer, template) + prompt_ids
    return prompt_ids + ids, [0] * len(prompt_ids) + mask


def encode_prompts(
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    *,
    limit: int,
    template: str = "chat",
    instruction: str = "cot",
) -> tuple[list[tuple[Example, list[int]]], int]:
    """Encodes the prompts of many examples, and drops those that are too long.

    Prompts are never truncated.

    Args:
      tokenizer: the model's tokenizer.
      examples: the questions.
      limit: the largest number of tokens of a prompt.
      template, instruction: as for `encode_prompt`.

    Returns:
      The kept examples, each with its token ids, and the number of dropped ones.

    Raises:
      GrpoError: more than half of the examples are too long, or one cannot be encoded.

    >>> from grpo_jax.data.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.from_alphabet("12+=")
    >>> kept, dropped = encode_prompts(
    ...     tokenizer, [Example("1+1="), Example("1+1+1=")], limit=4,
    ...     template="plain", instruction="none")
    >>> [example.question for example, ids in kept], dropped
    (['1+1='], 1)
    """
    kept, dropped, longest = [], 0, 0
    examples = iter(examples)
    while batch := list(itertools.islice(examples, TOGETHER)):
        try:
            encoded = _encode(tokenizer, batch, template, instruction)
        except GrpoError:  # one bad row, or the batch is above the template's limits
            encoded = [_encode(tokenizer, [e], template, instruction)[0] for e in batch]
        for example, ids in zip(batch, encoded, strict=True):
            longest = max(longest, len(ids))
            if len(ids) <= limit:
                kept.append((example, ids))
            else:
                dropped += 1
    if dropped > len(kept):
        raise GrpoError(
            f"prompts: {dropped} of {dropped + len(kept)} are longer than the limit of "
            f"{limit} tokens (the longest has {longest}); raise the limit"
        )
    return kept, dropped
