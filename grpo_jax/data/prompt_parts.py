"""The text of a prompt as parts, in which special tokens of the data stay plain text.

Templates: "chat" is the model's own (`chat_templates.py`), "deepseekmath" is that of
DeepSeekMath ("User: …\n\nAssistant:"), and "plain" is the question alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo_jax.data import chat_templates
from grpo_jax.data.chat_templates import Message, Rendered, quote_special_tokens
from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError

TEMPLATES = ("chat", "deepseekmath", "plain")
# The instruction appended to a question, by (instruction, language).
INSTRUCTIONS = {
    ("cot", "en"): "Please reason step by step, and put your final answer within "
    "\\boxed{}.",
    ("cot", "zh"): "请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
    ("tool", "en"): "Please integrate natural language reasoning with programs to "
    "solve the problem above, and put your final answer within \\boxed{}.",
    ("tool", "zh"): "请结合自然语言和Python程序语言来解答问题，并把最终答案放置于"
    "\\boxed{}中。",
}
Part = tuple[str, bool]  # text, and whether special tokens are parsed in it


def prompt_content(example: Example, instruction: str = "cot") -> str:
    """Returns the question, followed by the instruction on a new line.

    Chinese questions get the Chinese wording, all others the English one.

    Args:
      example: the question.
      instruction: "cot" (chain of thought), "tool" (with programs) or "none".

    Raises:
      GrpoError: the question is empty, or there is no such instruction.

    >>> prompt_content(Example("1+1=?", language="zh"))
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


def bos_ids(tokenizer: Tokenizer, template: str) -> list[int]:
    """Returns the BOS to put first; a chat template writes its own."""
    if template == "chat" or not tokenizer.adds_bos or tokenizer.bos_id is None:
        return []
    return [tokenizer.bos_id]


def written_prompt(
    tokenizer: Tokenizer, example: Example, template: str, instruction: str
) -> list[Part]:
    """Writes a prompt with the template "plain" or "deepseekmath".

    Raises:
      GrpoError: the template is another one, or has no form for several turns.
    """
    text, system = prompt_content(example, instruction), _system(example)
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
        for role, turn in turns:
            name, end = ("User", "\n\n") if role == "user" else ("Assistant", eos)
            parts += [(f"{name}: ", True), (turn, False), (end, True)]
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


def chat_messages(
    tokenizer: Tokenizer, example: Example, instruction: str
) -> list[Message]:
    """Returns the messages before the answer, with special tokens marked."""
    system, question = _system(example), prompt_content(example, instruction)
    turns = [("system", system)] if system else []
    turns += [*_turns(example), ("user", question)]
    return [chat_message(tokenizer, role, text) for role, text in turns]


def chat_message(tokenizer: Tokenizer, role: str, text: str) -> Message:
    """Returns a message in whose text special tokens are quoted."""
    return quote_special_tokens(
        {"role": role, "content": text}, tokenizer.special_pattern
    )


def split_parts(
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


def render_chats(
    tokenizer: Tokenizer,
    chats: Sequence[tuple[Sequence[Message], bool]],
    row: str = "",
) -> list[Rendered]:
    """Returns chats in the model's template, as transformers renders them.

    Args:
      tokenizer: the tokenizer, which holds the template.
      chats: pairs of messages (dicts with `role` and `content`) and whether the text
        ends where the assistant's answer starts.
      row: the id of the example, for errors.

    Raises:
      GrpoError: there is no chat template, or it fails.
    """
    if tokenizer.chat_template is None:
        raise GrpoError(
            "tokenizer: it has no chat template; use the template deepseekmath or plain"
        )
    how = tokenizer.chat_template, tokenizer.special_tokens
    try:
        return chat_templates.render_marked(*how, chats, tokenizer.now)
    except GrpoError as error:
        raise GrpoError(f"{error} (data {row!r})" if row else str(error)) from None
