"""From a question to the ids of a prompt; from a worked answer to an SFT row.

In: an `Example` and a `Tokenizer`.
Out: `encode_prompt`, the ids of q; `encode_sft`, ids with the mask of the tokens that
the loss covers: the answer and its EOS, never the prompt, never what a tool wrote.

Templates: "chat" is the model's own (jinja2, in its sandbox), "deepseekmath" the one of
DeepSeekMath ("User: …\n\nAssistant:"), "plain" the question as it is.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from grpo_jax.data import Example
from grpo_jax.errors import GrpoError
from grpo_jax.tokenizer import Tokenizer

TEMPLATES = ("chat", "deepseekmath", "plain")
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
# What the interpreter wrote of an ```output block: all behind its opening, with which
# the model asks for it.
_TOOL_OUTPUT = re.compile(
    r"^[ \t]*```output([ \t]*\n.*?(?:^[ \t]*```[ \t]*$\n?|\Z))", re.M | re.S
)
# Noncharacters of Unicode, which no text holds: they mark places in a rendering.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_NO_MARKS = {ord(_OPEN): None, ord(_CLOSE): None}


def content(example: Example, instruction: str = "cot") -> str:
    """The question with its instruction on a new line ("none": the question alone).

    Only Chinese has its own wording; every other language gets the English one.

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
    example: Example,
    *,
    template: str = "chat",
    instruction: str = "cot",
) -> list[int]:
    """The ids of the prompt q, up to where the model's answer starts.

    Special tokens are parsed where the template wrote them and nowhere else.

    >>> from grpo_jax.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.from_alphabet("12+=")
    >>> encode_prompt(tokenizer, Example("1+2="), template="plain", instruction="none")
    [3, 5, 4, 6]
    """
    parts = _prompt_parts(tokenizer, example, template, instruction)
    return _bos(tokenizer, template) + tokenizer.encode_parts(parts)[0]


def encode_sft(
    tokenizer: Tokenizer,
    example: Example,
    *,
    template: str = "chat",
    instruction: str = "cot",
) -> tuple[list[int], list[int]]:
    """(tokens, loss_mask) of a question with its worked answer.

    tokens: exactly the ids of `encode_prompt`, then the solution (without one: the
    answer), then the EOS. loss_mask: 1 on the solution's tokens and the EOS; 0 on the
    prompt and on what follows "```output" in such a block. Without a solution and an
    answer all 0: such a row weighs nothing.

    >>> from grpo_jax.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.from_alphabet("12+=3")
    >>> encode_sft(tokenizer, Example("1+2=", answer="3"), template="plain",
    ...            instruction="none")
    ([3, 5, 4, 6, 7, 2], [0, 0, 0, 0, 1, 1])
    """
    prompt = _prompt_parts(tokenizer, example, template, instruction)
    prompt_ids = tokenizer.encode_parts(prompt)[0]
    bos = _bos(tokenizer, template)
    target = example.solution or example.answer
    if not target.strip():
        return bos + prompt_ids, [0] * len(bos + prompt_ids)
    before, after = _around_answer(tokenizer, example, template, instruction)
    answer: list[Part] = [(before, True), (target, False)]
    # With the prompt before it, as some tokenizers put a space where a text begins;
    # alone, where prompt and answer would melt into one token.
    ids, offsets = tokenizer.encode_parts([*prompt, *answer])
    start = sum(len(text) for text, _ in prompt)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids, offsets = ids[len(prompt_ids) :], offsets[len(prompt_ids) :]
    else:
        ids, offsets = tokenizer.encode_parts(answer)
        start = 0
    start += len(before)
    tool = [found.span(1) for found in _TOOL_OUTPUT.finditer(target)]
    mask = [
        0 if any(a - start < end and b - start > begin for begin, end in tool) else 1
        for a, b in offsets
    ]
    end = _end_of_turn(tokenizer, after)
    prompt_ids = bos + prompt_ids
    return prompt_ids + ids + end, [0] * len(prompt_ids) + mask + [1] * len(end)


def encode_prompts(
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    *,
    limit: int,
    template: str = "chat",
    instruction: str = "cot",
) -> tuple[list[tuple[Example, list[int]]], int]:
    """The examples whose prompt has at most `limit` tokens, and how many were dropped.

    Nothing is cut short. Raises GrpoError if more than half would be dropped.

    >>> from grpo_jax.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.from_alphabet("12+=")
    >>> kept, dropped = encode_prompts(
    ...     tokenizer, [Example("1+1="), Example("1+1+1=")], limit=4,
    ...     template="plain", instruction="none")
    >>> [example.question for example, ids in kept], dropped
    (['1+1='], 1)
    """
    kept, dropped, longest = [], 0, 0
    for example in examples:
        ids = encode_prompt(
            tokenizer, example, template=template, instruction=instruction
        )
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
    """A chat template writes the BOS itself; before other text it is a tokenizer's."""
    if template == "chat" or not tokenizer.adds_bos or tokenizer.bos_id is None:
        return []
    return [tokenizer.bos_id]


def _prompt_parts(
    tokenizer: Tokenizer, example: Example, template: str, instruction: str
) -> list[Part]:
    text = content(example, instruction)
    if template == "chat":
        # Special tokens in what the data says are marked, and read back as plain text.
        messages = _messages(example, text)
        for message in messages:
            message["content"] = tokenizer.special_pattern.sub(
                rf"{_OPEN}\g<0>{_CLOSE}", message["content"].translate(_NO_MARKS)
            )
        rendered = render_chat(tokenizer, messages, add_generation_prompt=True)
        pieces = re.split(f"{_OPEN}(.*?){_CLOSE}", rendered, flags=re.S)
        return [(piece, i % 2 == 0) for i, piece in enumerate(pieces)]
    system = example.columns.get("system")
    head = [(f"{system}\n\n", False)] if system else []
    if template == "plain":
        return [*head, (text, False)]
    if template == "deepseekmath":
        return [*head, ("User: ", True), (text, False), ("\n\nAssistant:", True)]
    raise GrpoError(f"template {template!r}: use {', '.join(TEMPLATES)}")


def _messages(example: Example, text: str) -> list[dict[str, str]]:
    system = example.columns.get("system")
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": text}]


def _around_answer(
    tokenizer: Tokenizer, example: Example, template: str, instruction: str
) -> tuple[str, str]:
    """What a template writes between its prompt and the answer, and after that."""
    if template == "plain":
        return "", ""
    if template == "deepseekmath":
        return " ", ""
    messages = _messages(example, content(example, instruction))
    prompt = render_chat(tokenizer, messages, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": _OPEN})
    whole = render_chat(tokenizer, messages, add_generation_prompt=False)
    before, mark, after = whole.removeprefix(prompt).partition(_OPEN)
    if not mark or not whole.startswith(prompt):
        return "", ""  # its finished turns look otherwise: the answer goes on directly
    return before, after


def _end_of_turn(tokenizer: Tokenizer, after: str) -> list[int]:
    """What closes the turn, up to the first id that ends a completion."""
    ids = tokenizer.encode(after, parse_special=True)
    ends = [i for i, token in enumerate(ids) if token in tokenizer.eos_ids]
    return ids[: ends[0] + 1] if ends else [tokenizer.eos_id]


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a chat by the model's own template, as transformers renders it."""
    if tokenizer.chat_template is None:
        raise GrpoError(
            "tokenizer: it has no chat template; use the template deepseekmath or plain"
        )
    try:
        return _compile(tokenizer.chat_template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens,
        )
    except Exception as error:  # a template is a program: it can raise anything
        raise GrpoError(f"chat template: {error}") from error


class _Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %}, which some templates put round answers."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(8)
def _compile(template: str) -> jinja2.Template:
    """A template with what transformers gives it, in a sandbox: it may be anyone's."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    extras = {"raise_exception": raise_exception, "strftime_now": now}
    return environment.from_string(template, extras)
