r"""Tool-integrated reasoning: the model writes programs, an interpreter their output.

In: model, parameters, prompts, an `Interpreter`. Out: `Solutions`, token ids with a
mask that tells what was sampled from what the interpreter wrote.

The loop of DeepSeekMath's evaluation, for all rows at once:
1. sample up to EOS, or up to where the text has "```output", however it is tokenised;
2. a row whose text now ends with a closed ```python block calls the interpreter: the
   earlier blocks without their unindented lines that print, then the whole last block;
3. the programs run in parallel in the sandbox, while keys and values stay in the slots;
4. "\n{result}\n```\n" is encoded and appended, and the row goes on, for as many
   generations as are allowed.
What was sampled stays the ids that it is: nothing is decoded and encoded again. The
model never writes an output's text: "```output" ends its turn, and without a program
before it the row.

Axes: N rows, C positions of the longest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax import answers, sandbox
from grpo_jax.continuation import continue_rollouts
from grpo_jax.errors import GrpoError
from grpo_jax.model import Decoder, Params
from grpo_jax.rollout import generate
from grpo_jax.sandbox import Result, Sandbox, SandboxFailed
from grpo_jax.stopping import stop_table
from grpo_jax.tokenizer import Tokenizer

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

    timeout: seconds of wall and of CPU time for each. Raises GrpoError where no sandbox
    works, and where one that worked fails twice: that says nothing of the program.

    >>> [call.output for call in Interpreter()(["print(6 * 7)", "1 / 0"])]
    ['42', 'Runtime errors: ZeroDivisionError: division by zero']
    """

    def __init__(self, timeout: float = 10.0, sandbox: Sandbox | None = None):
        self.timeout, self.sandbox = timeout, sandbox or _sandbox()

    def __call__(self, programs: Sequence[str]) -> list[Call]:
        once = list(dict.fromkeys(programs))
        limits = dict(wall_seconds=self.timeout, cpu_seconds=self.timeout)
        try:
            found = self.sandbox.run_many(once, **limits)
        except SandboxFailed as fault:
            raise GrpoError(f"tools: {fault}; no output was counted as wrong") from None
        calls = {
            program: Call(program, said(result), result.status != "ok")
            for program, result in zip(once, found, strict=True)
        }
        return [calls[program] for program in programs]


def _sandbox() -> Sandbox:
    return sandbox.shared()


def said(result: Result) -> str:
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


# -- the loop --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solutions:
    """N outputs, on the host; what follows a row's end is 0."""

    tokens: np.ndarray  # [N, C] int32
    logps: np.ndarray  # [N, C] float32, of sampled tokens; 0 at the interpreter's
    mask: np.ndarray  # [N, C] bool: sampled
    lengths: np.ndarray  # [N] int32
    finished: np.ndarray  # [N] bool: ended with EOS
    occupancy: float  # of the first generation
    calls: list[list[Call]]  # of each row, in order


class _Row:
    """An output as it grows."""

    def __init__(self):
        self.tokens: list[int] = []
        self.logps: list[float] = []
        self.mask: list[bool] = []
        self.texts: list[str] = []  # of the model's turns, without "```output"
        self.calls: list[Call] = []
        self.finished = False

    def add(self, tokens: Sequence[int], logps: Sequence[float] | None = None) -> None:
        self.tokens += tokens
        self.logps += [0.0] * len(tokens) if logps is None else logps
        self.mask += [logps is not None] * len(tokens)

    def asks(self, tokenizer: Tokenizer) -> tuple[str, str] | None:
        """(program, how the text ends), where its last turn calls."""
        start = len(self.mask) - _last_run(self.mask)
        text = tokenizer.decode(self.tokens[start:])
        before, found, rest = text.partition(STOP)
        program = program_of(self.texts, before)
        self.texts.append(before)
        self.finished = self.tokens[-1] in tokenizer.eos_ids
        if program is None or self.finished or rest.strip():
            return None
        end = FENCE + before[len(before.rstrip()) :]
        return program, STOP + rest if found else end


def _last_run(mask: Sequence[Any]) -> int:
    """How many values at the end are true."""
    return next((i for i, m in enumerate(reversed(mask)) if not m), len(mask))


def solve(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    interpreter: Interpreter,
    key: jax.Array,
    samples: int = 1,
    generations: int = 2,
    max_new_tokens: int,
    temperature: float = 1.0,
    cache_dtype: str | None = None,
) -> Solutions:
    """Outputs with programs: N = prompts × samples, those of a prompt side by side.

    Args:
      generations: of an output, at most; programs run after each, the last one too.
      max_new_tokens: of each generation; an output that is cut off by it ends, unless
        it ends with a program.
      key: all draws come from it.
      others: as in `rollout.generate`.
    """
    options: Any = dict(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_id=tokenizer.eos_ids,
        stop_table=stop_table(tokenizer, (STOP,), model.config.vocab_size),
    )
    rows = [_Row() for _ in range(len(prompts) * samples)]
    appended: list[list[int] | None] = [[] for _ in rows]
    occupancy, out = 0.0, None
    for turn in range(generations):
        if out is None:
            out = generate(
                model,
                params,
                prompts,
                key=key,
                samples=samples,
                cache_dtype=cache_dtype,
                keep=generations > 1,
                **options,
            )
            occupancy = float(out.occupancy)
        else:
            # Rows fold their own numbers into a key: this one is none of theirs.
            again = jax.random.fold_in(key, (1 << 30) + turn)
            out = continue_rollouts(model, params, out, appended, key=again, **options)
        got = jax.device_get((out.tokens, out.logps, out.lengths))
        asked: dict[int, tuple[str, str]] = {}
        for i, (tokens, logps, n) in enumerate(zip(*got, strict=True)):
            given = appended[i]
            if given is None:
                continue
            row, new = rows[i], slice(len(given), int(n))
            row.add(given)
            row.add(tokens[new].tolist(), logps[new].tolist())
            if found := row.asks(tokenizer):
                asked[i] = found
        calls = interpreter([program for program, _ in asked.values()])
        appended = [None] * len(rows)
        for (i, (_, end)), call in zip(asked.items(), calls, strict=True):
            rows[i].calls.append(call)
            appended[i] = output_tokens(tokenizer, end, call.output)
        if not asked:
            break
    for row, ids in zip(rows, appended, strict=True):
        row.add(ids or [])
    return _gathered(rows, occupancy)


def _gathered(rows: Sequence[_Row], occupancy: float) -> Solutions:
    lengths = np.array([len(row.tokens) for row in rows], np.int32)
    shape = (len(rows), int(lengths.max()))
    found = {
        "tokens": np.zeros(shape, np.int32),
        "logps": np.zeros(shape, np.float32),
        "mask": np.zeros(shape, bool),
    }
    for name, table in found.items():
        for i, row in enumerate(rows):
            table[i, : lengths[i]] = getattr(row, name)
    return Solutions(
        **found,
        lengths=lengths,
        finished=np.array([row.finished for row in rows]),
        occupancy=occupancy,
        calls=[row.calls for row in rows],
    )


def most_tokens(generations: int, max_new_tokens: int) -> int:
    """The tokens of an output, at most, with what it is told; no generations: no tools.

    >>> most_tokens(0, 1024), most_tokens(2, 1024)
    (1024, 2368)
    """
    if not generations:
        return max_new_tokens
    return generations * (max_new_tokens + OUTPUT_TOKENS)


# -- what an output says ---------------------------------------------------------------


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], mask: Sequence[Any]) -> str:
    """An output's text; where the model opened an output that no program has, up to
    there."""
    text = tokenizer.decode(tokens)
    if mask and mask[-1]:
        own = tokenizer.decode(tokens[len(mask) - _last_run(mask) :])
        if STOP in own:
            text = text[: text.rindex(STOP)]
    return text


def answer(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    **options: Any,
) -> list[tuple[str, str | None]]:
    """Of each output of `solve`, its text and the answer of its last program."""
    found = solve(model, params, tokenizer, prompts, **options)
    texts = []
    for tokens, mask, n in zip(found.tokens, found.mask, found.lengths, strict=True):
        texts.append(text_of(tokenizer, tokens[:n].tolist(), mask[:n].tolist()))
    programs = [program_answer(calls) for calls in found.calls]
    return list(zip(texts, programs, strict=True))


def program_answer(calls: Sequence[Call]) -> str | None:
    """The answer of the last output, for program accuracy; None if it has none."""
    if not calls:
        return None
    return answers.extract(f"{STOP}\n{calls[-1].output}\n{FENCE}")
