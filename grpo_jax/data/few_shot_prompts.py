"""Few-shot prompts, for base models that do not follow instructions.

A prompt consists of worked examples and the question. `cut_at_next_question` removes
what a model writes after its answer, when it goes on to a question of its own.

The worked examples for GSM8K and MATH are drawn from their training files with a fixed
seed. The other sets use few_shot_examples.json, which was written for this project.
Results are therefore close to those of the published prompts, but not identical.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.data import datasets
from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError

Shot = tuple[str, str]  # question, worked answer


@dataclass(frozen=True)
class Format:
    """The format of a set's few-shot prompt."""

    question: str  # the label before a question
    answer: str  # the label before an answer
    ends: str  # the last sentence of a worked answer; {} is the final answer
    shots: int  # the number of worked examples
    source: str  # a set with a training file, or a key of few_shot_examples.json

    @property
    def stop(self) -> str:
        """The text that starts the next question."""
        return f"\n{self.question}"


_GSM = Format("Q:", "A:", "The answer is {}.", 8, "gsm8k")
_MATH = Format(
    "Problem:",
    "Solution:",
    "Final Answer: The final answer is ${}$. I hope it is correct.",
    4,
    "math",
)
_ENDS_ZH = "所以答案是 {}。"
_ZH = Format("问题：", "答案：", _ENDS_ZH, 6, "zh")
_CHOICE = dataclasses.replace(_MATH, ends="The final answer is ({}).", source="sat")
FORMATS = {
    "gsm8k": _GSM,
    "gsm_hard": _GSM,
    "svamp": _GSM,
    "mawps": _GSM,
    "math": _MATH,
    "math500": _MATH,
    "ocw": dataclasses.replace(_MATH, source="ocw"),
    "sat": _CHOICE,
    "mmlu_stem": dataclasses.replace(_CHOICE, source="mmlu_stem"),
    "cmath": _ZH,
    "gaokao_mathcloze": dataclasses.replace(_ZH, shots=5, source="cloze"),
    "gaokao_mathqa": dataclasses.replace(_ZH, shots=5, source="choice_zh"),
    "mgsm_zh": _ZH,
    **{f"mgsm_{language}": _GSM for language in ("de", "en", "es", "fr", "ja")},
}
SEED = 0
LONGEST = 400  # characters of a drawn worked answer, so that eight fit in a prompt


def find_format(name: str) -> Format:
    """Returns the format of a set's few-shot prompts.

    Raises:
      GrpoError: the set has none.

    >>> find_format("gsm8k").shots, find_format("cmath").stop
    (8, '\\n问题：')
    """
    if name not in FORMATS:
        raise GrpoError(
            f"set {name!r}: no few-shot prompt; ask it without --few_shot, or one of "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[name]


def add_few_shot_prompt(
    name: str, example: Example, *, data_dir: str | None = None
) -> Example:
    """Returns the example with its few-shot prompt as the question.

    Args:
      name: the set's name, a key of `FORMATS`.
      example: the example to ask.
      data_dir: the folder of the original files; see `datasets.load_dataset`.

    Raises:
      GrpoError: the set has no format, or its training file cannot be read.

    >>> print(add_few_shot_prompt("cmath", Example("2加3等于几？")).question[-23:])
    答案是 8。
    <BLANKLINE>
    问题： 2加3等于几？
    答案：
    """
    form = find_format(name)
    blocks = [
        f"{form.question} {question}\n{form.answer} {answer}"
        for question, answer in _worked_examples(form, data_dir)
    ]
    blocks.append(f"{form.question} {example.question}\n{form.answer}")
    return dataclasses.replace(example, question="\n\n".join(blocks))


def cut_at_next_question(text: str, form: Format) -> str:
    """Returns a completion up to where the model asks itself the next question.

    >>> cut_at_next_question(" It is 3.\\n\\nQ: And 4 + 4?", find_format("gsm8k"))
    ' It is 3.\\n'
    """
    return text.partition(form.stop)[0]


def stop_ids(tokenizer: Tokenizer, form: Format) -> list[list[int]]:
    """Returns the token ids of the next question's label after a line break.

    The sampler ends a completion there; `cut_at_next_question` decides what counts.

    Returns:
      A list with one sequence of ids, or [] if the label begins within a token.
    """
    ids = tokenizer.encode(f"1.\n\n{form.question}")
    for n in range(1, len(ids)):
        if tokenizer.decode(ids[-n:]) == form.question:
            return [ids[-n:]]
    return []


@functools.cache
def written_examples() -> dict[str, list[dict[str, Any]]]:
    """Returns the worked examples of few_shot_examples.json, by `Format.source`."""
    file = Path(__file__).with_name("few_shot_examples.json")
    return json.loads(file.read_text(encoding="utf-8"))


@functools.lru_cache(32)
def _worked_examples(form: Format, data_dir: str | None) -> Sequence[Shot]:
    """Returns a set's worked examples; those of a training file are drawn."""
    written = written_examples().get(form.source)
    if written is not None:
        between, examples = " ", [Example(**shot) for shot in written]
    else:
        between, needed = "\n", ("solution",)
        train = datasets.load_dataset(form.source, data_dir=data_dir, require=needed)
        order = random.Random(SEED).sample(range(len(train)), 50 * form.shots)
        short = (e for i in order if len((e := train[i]).solution) <= LONGEST)
        examples = [e for e in short if "[asy]" not in e.question]
    return [
        (e.question, f"{e.solution}{between}{form.ends.format(e.answer)}")
        for e in examples[: form.shots]
    ]
