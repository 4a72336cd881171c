"""Encodes questions as prompts, and questions with worked answers as SFT rows.

`encode_prompt` returns the token ids of a question q. `encode_sft` returns token ids
and a loss mask. The mask covers the answer and its EOS, but not the prompt and not the
output of a tool.

Templates: "chat" is the model's own (`chat_templates.py`), "deepseekmath" is that of
DeepSeekMath ("User: …\n\nAssistant:"), and "plain" is the question alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

from grpo_jax.data import chat_templates
from grpo_jax.data.chat_templates import Message, Rendered, ended, quoted, unmarked
from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError

TEMPLATES = ("chat", "deepseekmath", "plain")
TOGETHER = 64  # prompts rendered in one request
# The instruction appended to a question, by (instruction, language).
INSTRUCTIONS = {
    ("cot", "en"): "Please reason step by step, and put your final answer within "
    "\\boxed{}.",
    ("cot", "zh"): "请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
    (
        "tool",
        "en",
    ): "Please integrate natural language reasoning with programs to solve "
    "the problem above, and put your final answer within \\boxed{}.",
    ("tool", "zh"): "请结合自然语言和Python程序语言来解答问题，并把最终答案放置于"
    "\\boxed{}中。",
}
Part = tuple[str, bool]  # text, and whether special tokens are parsed in it
# The interpreter's part of an ```output block: everything after the opening line,
# which the model writes to call the interpreter.
_TOOL_OUTPUT = re.compile(
    r"^[ \t]*```output([ \t]*\n.*?(?:^[ \t]*```[ \t]*$\n?|\Z))", re.M | re.S
)
# A tag at the end of a prompt, such as <think>. The answer does not repeat it.
_OPENED = re.compile(r"([<\[][^<>\[\]\s]{1,32}[>\]])\s*\Z")


def content(example: Example, instruction: str = "cot") -> str:
    """Returns the question, followed by the instruction on a new line.

    Chinese questions get the Chinese wording, all others the English one.

    Args:
      example: the question.
      instruction: "cot" (chain of thought), "tool" (with programs) or "none".

    Raises:
      GrpoError: the question is empty, or there is no such instruction.

    >>> content(Example("1+1=?", language="zh"))
    '1+1=?\\n请通过逐步推理来解答问题，并把最终答案放置于\\\\boxed{}中。'
    """
    if not example.question.strip():
        raise GrpoError(f"data {example.id!r}: the question is empty; remove the row")
    if instruction == "none":
        return example.question
    language = "zh" if example.language.startswith("zh") else "en"
    if (instruction, language) not in INSTRUCTIONS:
        raise GrpoError(f"instruction {instruction!r}: use cot, tool or none")
    return f"{example.question}\n{INSTRUCTIONS[instruction, language]}"


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
      instruction: "cot", "tool" or "none"; see `content`.

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
        chats = [(_messages(tokenizer, e, instruction), True) for e in examples]
        every = [
            _parts(tokenizer, rendered, 0, len(rendered.text))
            for rendered in _render(tokenizer, chats, row=examples[0].id)
        ]
    else:
        every = [_written(tokenizer, e, template, instruction) for e in examples]
    bos, found = _bos(tokenizer, template), []
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
    prompt, answer = _answered(tokenizer, example, template, instruction, target)
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
    prompt_ids = _bos(tokenizer, template) + prompt_ids
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
      template: as for `encode_prompt`.
      instruction: as for `encode_prompt`.

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


# -- templates ---------------------------------------------------------------------


def _bos(tokenizer: Tokenizer, template: str) -> list[int]:
    """Returns the BOS to put first; a chat template writes its own."""
    if template == "chat" or not tokenizer.adds_bos or tokenizer.bos_id is None:
        return []
    return [tokenizer.bos_id]


def _written(
    tokenizer: Tokenizer, example: Example, template: str, instruction: str
) -> list[Part]:
    """Writes a prompt with the template "plain" or "deepseekmath"."""
    text, system = content(example, instruction), _system(example)
    parts: list[Part] = [(f"{system}\n\n", False)] if system else []
    turns = _turns(example)
    if template == "plain":
        if turns:
            raise GrpoError(
                f"data {example.id!r}: its messages are several turns, which the "
                "template plain does not have; use chat or deepseekmath"
            )
        return [*parts, (text, False)]
    if template == "deepseekmath":
        eos = tokenizer.decode([tokenizer.eos_id], skip_special=False)
        for role, said in turns:
            name, end = ("User", "\n\n") if role == "user" else ("Assistant", eos)
            parts += [(f"{name}: ", True), (said, False), (end, True)]
        return [*parts, ("User: ", True), (text, False), ("\n\nAssistant:", True)]
    raise GrpoError(f"template {template!r}: use {', '.join(TEMPLATES)}")


def _system(example: Example) -> str:
    system = example.columns.get("system") or ""
    if not isinstance(system, str):
        raise GrpoError(f"data {example.id!r}: its system prompt is not a text")
    return system


def _turns(example: Example) -> list[tuple[str, str]]:
    """Returns the (role, text) pairs of the turns before the question."""
    turns = example.columns.get("messages") or ()
    return [(turn["role"], turn["content"]) for turn in turns]


def _messages(
    tokenizer: Tokenizer, example: Example, instruction: str
) -> list[Message]:
    """Returns the messages before the answer, with special tokens marked."""
    system, question = _system(example), content(example, instruction)
    said = [("system", system)] if system else []
    said += [*_turns(example), ("user", question)]
    return [_message(tokenizer, role, text) for role, text in said]


def _message(tokenizer: Tokenizer, role: str, text: str) -> Message:
    return quoted({"role": role, "content": text}, tokenizer.special_pattern)


def _parts(
    tokenizer: Tokenizer, rendered: Rendered, start: int, end: int
) -> list[Part]:
    """Splits a part of a chat so that special tokens in the data stay plain text."""
    parts: list[Part] = []
    for found in tokenizer.special_pattern.finditer(rendered.text, start, end):
        if found.start() in rendered.quotes:
            parts.append((rendered.text[start : found.start()], True))
            parts.append((found[0], False))
            start = found.end()
    return [*parts, (rendered.text[start:end], True)]


# -- the answer --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Answer:
    """The answer of an SFT row; spans are (start, end) in the joined parts."""

    parts: list[Part]
    tools: list[tuple[int, int]]  # spans that a tool wrote
    gaps: list[tuple[int, int]]  # spans outside the {% generation %} blocks
    closed: bool  # whether it ends with the token that ends a turn

    def learned(self, start: int, end: int) -> bool:
        """Returns whether the loss covers a token with this span."""
        return not (
            any(start < y and end > x for x, y in self.tools)
            or any(start >= x and end <= y for x, y in self.gaps)
        )


def _answered(
    tokenizer: Tokenizer,
    example: Example,
    template: str,
    instruction: str,
    target: str,
) -> tuple[list[Part], _Answer]:
    """Returns the parts of a prompt, and the answer that follows it."""
    if template != "chat":
        prompt = _written(tokenizer, example, template, instruction)
        answer = " " + target if template == "deepseekmath" else target
        return prompt, _Answer([(answer, False)], _tool_outputs(answer), [], False)
    target = unmarked(target)
    messages = _messages(tokenizer, example, instruction)
    said = _message(tokenizer, "assistant", target)
    ends_before_spaces = [([*messages, ended(said, before_spaces=True)], False)]
    if target == target.rstrip():
        ends_before_spaces = []  # no trailing white space: both ends are the same
    opened, whole, *marked = _render(
        tokenizer,
        [
            (messages, True),
            ([*messages, said], False),
            ([*messages, ended(said)], False),
            *ends_before_spaces,
        ],
        row=example.id,
    )
    start = len(opened.text)
    prompt = _parts(tokenizer, opened, 0, start)
    known = [m for m in marked if m.ends]
    if not whole.text.startswith(opened.text) or _squeezed(target) not in _squeezed(
        whole.text[start:]
    ):
        # The template writes a finished turn differently from the prompt, or drops
        # a part of the answer such as its thoughts. Append the answer directly.
        after = known[0] if known else opened
        return prompt, _direct(tokenizer, opened.text, target, after)
    ends = [m.ends[-1] for m in known if m.text == whole.text]
    end = max([start, *ends[:1]])
    close = _end_of_turn(tokenizer, whole, end)
    if not ends:
        end = len(whole.text) if close is None else close[0]
    blocks = [(x, y) for x, y in whole.blocks if x < end and y > start]
    edges = [start, *(place for block in blocks for place in block), end]
    gaps = list(zip(edges[::2], edges[1::2], strict=True)) if blocks else []
    return prompt, _Answer(
        _parts(tokenizer, whole, start, end if close is None else close[1]),
        _tool_outputs(whole.text[start:end]),
        [(x - start, y - start) for x, y in gaps if x < y],
        close is not None,
    )


def _direct(tokenizer: Tokenizer, prompt: str, target: str, after: Rendered) -> _Answer:
    """Returns the answer as written, with the end of turn of a finished chat."""
    opened = _OPENED.search(prompt)
    if opened and target.lstrip().startswith(opened[1]):
        target = target.lstrip().removeprefix(opened[1])
        if prompt.endswith("\n"):
            target = target.removeprefix("\n")
    end = after.ends[-1] if after.ends else len(after.text)
    close = _end_of_turn(tokenizer, after, end)
    parts: list[Part] = [(target, False)]
    if close is not None:
        parts.append((after.text[end : close[1]], True))
    return _Answer(parts, _tool_outputs(target), [], close is not None)


def _end_of_turn(
    tokenizer: Tokenizer, rendered: Rendered, start: int
) -> tuple[int, int] | None:
    """Returns the span of the first end-of-completion token that the template wrote."""
    for found in tokenizer.special_pattern.finditer(rendered.text, start):
        if found.start() not in rendered.quotes:
            if tokenizer.token_id(found[0]) in tokenizer.eos_ids:
                return found.span()
    return None


def _tool_outputs(text: str) -> list[tuple[int, int]]:
    return [found.span(1) for found in _TOOL_OUTPUT.finditer(text)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Returns the text of a chat in the model's template, as transformers renders it.

    Args:
      tokenizer: the tokenizer, which holds the template.
      messages: dicts with `role` and `content`.
      add_generation_prompt: end the text where the assistant's answer starts.

    Raises:
      GrpoError: there is no chat template, or it fails.
    """
    return _render(tokenizer, [(messages, add_generation_prompt)])[0].text


def _render(
    tokenizer: Tokenizer,
    chats: Sequence[tuple[Sequence[Message], bool]],
    row: str = "",
) -> list[Rendered]:
    if tokenizer.chat_template is None:
        raise GrpoError(
            "tokenizer: it has no chat template; use the template deepseekmath or plain"
        )
    how = tokenizer.chat_template, tokenizer.special_tokens
    try:
        return chat_templates.render(*how, chats, tokenizer.now)
    except GrpoError as error:
        raise GrpoError(f"{error} (data {row!r})" if row else str(error)) from None
