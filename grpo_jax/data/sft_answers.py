"""The answer of an SFT row: which text follows the prompt, and what the loss covers."""

from __future__ import annotations

import dataclasses
import re

from grpo_jax.data.chat_templates import Rendered, mark_end, remove_marks
from grpo_jax.data.example import Example
from grpo_jax.data.prompt_parts import (
    Part,
    chat_message,
    chat_messages,
    render_chats,
    split_parts,
    written_prompt,
)
from grpo_jax.data.tokenizer import Tokenizer

# The interpreter's part of an ```output block: everything after the opening line,
# which the model writes to call the interpreter.
_TOOL_OUTPUT = re.compile(
    r"^[ \t]*```output([ \t]*\n.*?(?:^[ \t]*```[ \t]*$\n?|\Z))", re.M | re.S
)


# A tag at the end of a prompt, such as <think>. The answer does not repeat it.
_OPENED = re.compile(r"([<\[][^<>\[\]\s]{1,32}[>\]])\s*\Z")


@dataclasses.dataclass(frozen=True)
class Answer:
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


def split_answer(
    tokenizer: Tokenizer,
    example: Example,
    template: str,
    instruction: str,
    target: str,
) -> tuple[list[Part], Answer]:
    """Returns the parts of a prompt, and the answer that follows it."""
    if template != "chat":
        prompt = written_prompt(tokenizer, example, template, instruction)
        answer = " " + target if template == "deepseekmath" else target
        return prompt, Answer([(answer, False)], _tool_outputs(answer), [], False)
    target = remove_marks(target)
    messages = chat_messages(tokenizer, example, instruction)
    turn = chat_message(tokenizer, "assistant", target)
    turns = [turn, mark_end(turn)]
    if target != target.rstrip():  # a template may trim an answer
        turns.append(mark_end(turn, before_spaces=True))
    chats = [(messages, True), *(([*messages, turn], False) for turn in turns)]
    opened, whole, *marked = render_chats(tokenizer, chats, row=example.id)
    start = len(opened.text)
    prompt = split_parts(tokenizer, opened, 0, start)
    known = [m for m in marked if m.ends]
    kept = _without_spaces(target) in _without_spaces(whole.text[start:])
    if not kept or not whole.text.startswith(opened.text):
        # The template writes a finished turn differently from the prompt, or drops
        # a part of the answer such as its thoughts. Append the answer directly.
        after = known[0] if known else opened
        return prompt, _append_directly(tokenizer, opened.text, target, after)
    ends = [m.ends[-1] for m in known if m.text == whole.text]
    end = max([start, *ends[:1]])
    close = _end_of_turn(tokenizer, whole, end)
    if not ends:
        end = len(whole.text) if close is None else close[0]
    blocks = [(x, y) for x, y in whole.blocks if x < end and y > start]
    edges = [start, *(place for block in blocks for place in block), end]
    gaps = list(zip(edges[::2], edges[1::2], strict=True)) if blocks else []
    return prompt, Answer(
        split_parts(tokenizer, whole, start, end if close is None else close[1]),
        _tool_outputs(whole.text[start:end]),
        [(x - start, y - start) for x, y in gaps if x < y],
        close is not None,
    )


def _append_directly(
    tokenizer: Tokenizer, prompt: str, target: str, after: Rendered
) -> Answer:
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
    return Answer(parts, _tool_outputs(target), [], close is not None)


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


def _without_spaces(text: str) -> str:
    return "".join(text.split())
