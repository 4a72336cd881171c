r"""Runs the Python programs in a model's text and formats their output for the model.

The rules are those of DeepSeekMath's evaluation code. A ```python block at the end of a
text is run after the earlier blocks, whose unindented lines that print are left out.
The model is given what the program printed, or "Runtime errors: …". Of more than 100
characters it gets the first and the last 50.
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
KEPT = 50  # characters kept at each end of a long output
OUTPUT_TOKENS = 160  # most tokens of an output with its fences


# -- programs in a text ----------------------------------------------------------------


def python_blocks(text: str) -> list[str]:
    """Returns the programs in a text's closed ```python blocks, without empty ones."""
    parts = text.split(PROGRAM)[1:]
    blocks = [part.partition(FENCE)[0].strip("\n") for part in parts if FENCE in part]
    return [block for block in blocks if block.strip()]


def program_to_run(before: Sequence[str], text: str) -> str | None:
    r"""Returns the program that a text asks to run, or None if it ends without one.

    Args:
      before: the model's earlier turns, whose programs run first.
      text: the model's last turn.

    >>> print(program_to_run(["```python\nx = 2\nprint(x)\n```\n"],
    ...                  "Again:\n```python\nprint(x + 1)\n```\n"))
    x = 2
    print(x + 1)
    """
    if not text.rstrip().endswith(FENCE) or not (blocks := python_blocks(text)):
        return None
    earlier = [b for part in before for b in python_blocks(part)] + blocks[:-1]
    lines = [line for block in earlier for line in block.split("\n")]
    return "\n".join([*filter(_runs_again, lines), blocks[-1]])


def _runs_again(line: str) -> bool:
    """Returns whether a line runs again before a later block; bare prints do not."""
    return "print(" not in line or line.startswith((" ", "\t", "import", "def "))


# -- the interpreter -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProgramCall:
    """A program that was run, the output given to the model, and whether it failed."""

    program: str
    output: str
    failed: bool


class Interpreter:
    """Runs programs in a sandbox, in parallel; equal programs run once.

    With several processes all must call it with the same programs: each process runs
    its share of them, and all get every `ProgramCall`.

    Args:
      timeout: limit in seconds on each program's wall time and on its CPU time.
      sandbox: where programs run; the shared sandbox if None.

    Raises:
      GrpoError: no sandbox works here, or a working one failed twice. The program is
        then not counted as wrong.

    >>> [call.output for call in Interpreter()(["print(6 * 7)", "1 / 0"])]
    ['42', 'Runtime errors: ZeroDivisionError: division by zero']
    """

    def __init__(self, timeout: float = 10.0, sandbox: Sandbox | None = None):
        self.timeout, self.sandbox = timeout, sandbox or shared_sandbox()

    def __call__(self, programs: Sequence[str]) -> list[ProgramCall]:
        """Runs the programs and returns a `ProgramCall` for each of them."""
        once = list(dict.fromkeys(programs))
        results = processes.map_divided(self._run, once)
        calls = {p: ProgramCall(p, *x) for p, x in zip(once, results, strict=True)}
        return [calls[program] for program in programs]

    def _run(self, programs: Sequence[str]) -> list[tuple[str, bool]]:
        """Returns each program's output for the model, and whether it failed."""
        limits = dict(wall_seconds=self.timeout, cpu_seconds=self.timeout)
        try:
            found = self.sandbox.run_programs(programs, **limits)
        except SandboxError as fault:
            raise GrpoError(f"tools: {fault}; no output was counted as wrong") from None
        return [(output_text(result), result.status != "ok") for result in found]


def output_text(result: ProgramResult) -> str:
    """Returns the output given to the model: what was printed, or the error."""
    if result.status in ("ok", "output_limit") and (text := result.stdout.strip()):
        return shorten_text(text)
    fault = result.stderr.strip().rpartition("\n")[2]
    fault = "Timeout Error" if result.status == "timeout" else fault
    return f"Runtime errors: {shorten_text(fault)}".strip()


def shorten_text(text: str, kept: int = KEPT) -> str:
    """Returns the first and last `kept` characters of a text longer than both.

    >>> shorten_text("1" * 200) == "1" * 50 + "..." + "1" * 50
    True
    """
    return text if len(text) <= 2 * kept else f"{text[:kept]}...{text[-kept:]}"


# -- outputs as tokens -----------------------------------------------------------------


def encode_after(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """Encodes a text that follows another one.

    Args:
      tokenizer: the model's tokenizer.
      before: the end of the text before it.
      text: the text; a character that the tokenizer cannot encode becomes a question
        mark, or is left out if that cannot be encoded either.

    Returns:
      The token ids of `text` alone.
    """
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
    r"""Returns the token ids that the interpreter appends for an output.

    Args:
      tokenizer: the model's tokenizer.
      end: the end of the model's text: a fence or "```output", and white space.
      output: the output; it is shortened further if it takes more than OUTPUT_TOKENS.

    >>> tokenizer = Tokenizer.from_alphabet("```output\n42")
    >>> tokenizer.decode(output_tokens(tokenizer, "```\n", "42"))
    '```output\n42\n```\n'
    """
    opening = "" if "\n" in end else "\n"
    if not end.startswith(STOP):
        opening += f"{STOP}\n"
    kept, fits = KEPT, output
    while True:
        ids = encode_after(tokenizer, end, f"{opening}{fits}\n{FENCE}\n")
        if len(ids) <= OUTPUT_TOKENS or kept == 0:
            return ids[:OUTPUT_TOKENS]
        kept //= 2
        fits = shorten_text(output, kept)
