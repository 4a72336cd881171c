r"""The interpreter: the programs in a model's text, and what it is told of them.

In: texts that a model wrote. Out: for each program a `Call`: what it printed, or
"Runtime errors: …", and how a tokenizer has it.

The rules are those of DeepSeekMath's evaluation: a ```python block at the end of a text
is run behind the earlier ones, which go without their unindented lines that print; of
an output over 100 characters the first and the last 50 are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.sandbox import ProgramResult, Sandbox, SandboxError, shared_sandbox

STOP = "```output"
PROGRAM = "```python"
FENCE = "```"
KEPT = 50  # characters of a long result's beginning, and of its end
OUTPUT_TOKENS = 160  # of an output with its fences, at most


# -- from a text to a program ----------------------------------------------------------


def blocks_of(text: str) -> list[str]:
    """The closed ```python blocks of a text that have anything in them."""
    parts = text.split(PROGRAM)[1:]
    blocks = [part.partition(FENCE)[0].strip("\n") for part in parts if FENCE in part]
    return [block for block in blocks if block.strip()]


def program_of(before: Sequence[str], text: str) -> str | None:
    r"""The program that a text asks to run, None if it does not end with one.

    before: what the model wrote earlier, whose programs it builds on.

    >>> print(program_of(["```python\nx = 2\nprint(x)\n```\n"],
    ...                  "Again:\n```python\nprint(x + 1)\n```\n"))
    x = 2
    print(x + 1)
    """
    if not text.rstrip().endswith(FENCE) or not (own := blocks_of(text)):
        return None
    earlier = [block for part in before for block in blocks_of(part)] + own[:-1]
    lines = [line for block in earlier for line in block.split("\n")]
    return "\n".join([*filter(_stays, lines), own[-1]])


def _stays(line: str) -> bool:
    """Whether a line is run again with a later block: all but unindented prints."""
    return "print(" not in line or line.startswith((" ", "\t", "import", "def "))


# -- the interpreter -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """A program that was run, what the model is told, and whether it failed."""

    program: str
    output: str
    failed: bool


class Interpreter:
    """Runs programs in a sandbox, side by side; equal ones once.

    Of several processes all call with the same programs: each runs its share, and all
    get every `Call`. timeout: seconds of wall and of CPU time for each program. Raises
    GrpoError where no sandbox works, and where one that worked fails twice: that says
    nothing of the program.

    >>> [call.output for call in Interpreter()(["print(6 * 7)", "1 / 0"])]
    ['42', 'Runtime errors: ZeroDivisionError: division by zero']
    """

    def __init__(self, timeout: float = 10.0, sandbox: Sandbox | None = None):
        self.timeout, self.sandbox = timeout, sandbox or shared_sandbox()

    def __call__(self, programs: Sequence[str]) -> list[Call]:
        once = list(dict.fromkeys(programs))
        told = processes.divide(self._run, once)
        calls = {p: Call(p, *one) for p, one in zip(once, told, strict=True)}
        return [calls[program] for program in programs]

    def _run(self, programs: Sequence[str]) -> list[tuple[str, bool]]:
        """What is told of each, and whether it failed."""
        limits = dict(wall_seconds=self.timeout, cpu_seconds=self.timeout)
        try:
            found = self.sandbox.run_programs(programs, **limits)
        except SandboxError as fault:
            raise GrpoError(f"tools: {fault}; no output was counted as wrong") from None
        return [(said(result), result.status != "ok") for result in found]


def said(result: ProgramResult) -> str:
    """What the model is told of a program: what it printed, or how it failed."""
    if result.status in ("ok", "output_limit") and (text := result.stdout.strip()):
        return shortened(text)
    fault = result.stderr.strip().rpartition("\n")[2]
    fault = "Timeout Error" if result.status == "timeout" else fault
    return f"Runtime errors: {shortened(fault)}".strip()


def shortened(text: str, kept: int = KEPT) -> str:
    """The first and the last characters of a text that has more than both.

    >>> shortened("1" * 200) == "1" * 50 + "..." + "1" * 50
    True
    """
    return text if len(text) <= 2 * kept else f"{text[:kept]}...{text[-kept:]}"


# -- what the model is told, as tokens ------------------------------------------------


def encoded(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """The ids of a text behind another one, whose end is `before`; a character that the
    tokenizer does not have becomes a question mark, or nothing."""
    for c in sorted(set(text)):
        for other in (c, "?", ""):
            try:
                tokenizer.encode(other)
            except GrpoError:
                continue
            text = text.replace(c, other)
            break
    first = tokenizer.encode(before)
    whole = tokenizer.encode(before + text)
    joined = whole[: len(first)] == first
    return whole[len(first) :] if joined else tokenizer.encode(text)


def output_tokens(tokenizer: Tokenizer, end: str, output: str) -> list[int]:
    r"""The ids that the interpreter appends.

    end: how the model's text ends: a fence, or "```output", with its white space.

    >>> tokenizer = Tokenizer.from_alphabet("```output\n42")
    >>> tokenizer.decode(output_tokens(tokenizer, "```\n", "42"))
    '```output\n42\n```\n'
    """
    opening = "" if "\n" in end else "\n"
    if not end.startswith(STOP):
        opening += f"{STOP}\n"
    kept, fits = KEPT, output
    while True:
        ids = encoded(tokenizer, end, f"{opening}{fits}\n{FENCE}\n")
        if len(ids) <= OUTPUT_TOKENS or kept == 0:
            return ids[:OUTPUT_TOKENS]
        kept //= 2
        fits = shortened(output, kept)
