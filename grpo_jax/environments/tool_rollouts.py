r"""Tool-integrated reasoning: the model writes programs and reads what they print.

This is the loop of DeepSeekMath's evaluation code, for all rows at once:
1. Sample up to EOS, or until the text contains "```output", in whatever tokens.
2. A row whose text now ends with a closed ```python block calls the interpreter, with
   the earlier blocks (without unindented lines that print) and the last block.
3. The programs run in parallel in the sandbox, each process running its share. The
   rows' keys and values stay in the cache.
4. "\n{result}\n```\n" is encoded and appended, and the row continues, up to the
   allowed number of generations.
Sampled token ids are never decoded and encoded again. "```output" ends the model's
turn, so the model never writes an output itself; without a program, it ends the row.

Axes: N rows, C positions of the longest row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.arguments import check_whole
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import sharding
from grpo_jax.environments.interpreter import (
    FENCE,
    OUTPUT_TOKENS,
    STOP,
    Interpreter,
    ProgramCall,
    output_tokens,
    program_to_run,
)
from grpo_jax.generation.continuation import continue_rollouts
from grpo_jax.generation.kv_cache import select_slots
from grpo_jax.generation.reshard import reshard_for_decoding
from grpo_jax.generation.rollout_shapes import bucket_length
from grpo_jax.generation.sampler import Rollouts, generate
from grpo_jax.generation.stop_strings import make_stop_table
from grpo_jax.models.decoder import Decoder, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solutions:
    """N outputs, on the host. Positions after a row's end hold 0."""

    tokens: np.ndarray  # [N, C] int32
    logps: np.ndarray  # [N, C] float32, in nats; 0 on the interpreter's tokens
    mask: np.ndarray  # [N, C] bool, True on sampled tokens
    lengths: np.ndarray  # [N] int32
    finished: np.ndarray  # [N] bool, ended with EOS
    occupancy: float  # of the slots in the first generation
    calls: list[list[ProgramCall]]  # of each row, in order


class _Row:
    """A growing output: the turns of the model and of the interpreter."""

    def __init__(self):
        self.tokens: list[int] = []
        self.logps: list[float] = []
        self.mask: list[bool] = []
        self.texts: list[str] = []  # of the model's turns, without "```output"
        self.calls: list[ProgramCall] = []
        self.appended: list[int] = []  # tokens of the interpreter's last turn
        self.program: str | None = None  # that the last turn asks to run
        self.end = ""  # end of the text that asks to run it
        self.finished = False

    def add(self, tokens: Sequence[int], logps: Sequence[float] | None = None) -> None:
        self.tokens += tokens
        self.logps += [0.0] * len(tokens) if logps is None else logps
        self.mask += [logps is not None] * len(tokens)

    def add_turn(self, tokenizer: Tokenizer, tokens: list[int], logps: list[float]):
        """Adds a turn of the model, which calls the interpreter or ends the row."""
        self.add(tokens, logps)
        text = tokenizer.decode(tokens)
        before, found, rest = text.partition(STOP)
        program = program_to_run(self.texts, before)
        self.texts.append(before)
        self.finished = tokens[-1] in tokenizer.eos_ids
        ends = self.finished or rest.strip()
        self.program = None if ends else program
        self.end = STOP + rest if found else FENCE + before[len(before.rstrip()) :]

    def add_output(self, tokenizer: Tokenizer, call: ProgramCall) -> None:
        """Adds a turn of the interpreter."""
        self.calls.append(call)
        self.appended = output_tokens(tokenizer, self.end, call.output)
        self.add(self.appended)


def generate_with_tools(
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
    rows: int = 0,
) -> Solutions:
    """Samples outputs in which the model may run programs.

    Args:
      model: the decoder.
      params: its parameters.
      tokenizer: the model's tokenizer.
      prompts: token ids of each prompt.
      interpreter: runs the programs.
      key: PRNG key of all draws; later ones also depend on which rows continue.
      samples: outputs of each prompt.
      generations: most generations of an output; programs run after each of them, the
        last one included.
      max_new_tokens: limit on the tokens of each generation. An output that reaches it
        ends, unless its text ends with a program.
      temperature, cache_dtype: as in `sampler.generate`.
      rows: most rows whose keys and values are held at a time, at least those of one
        prompt; 0 holds all rows.

    Returns:
      N = prompts × samples solutions; those of a prompt are contiguous.

    Raises:
      GrpoError: an option or a prompt is out of range, or the sandbox does not work.
    """
    options: Any = dict(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_id=tokenizer.eos_ids,
        stop_table=make_stop_table(tokenizer, (STOP,), model.config.vocab_size),
    )
    check_whole("generate_with_tools", generations=generations)
    check_whole("generate_with_tools", least=0, rows=rows)
    size = max(1, rows // samples) if rows else len(prompts)
    layout, params = reshard_for_decoding(model, params)
    multiple = 1
    if layout is not None:
        multiple = sharding.rows_multiple(layout)
        everywhere = jax.NamedSharding(layout, sharding.P())
        bits = sharding.place_on_devices(jax.random.key_data(key), everywhere)
        key = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(key))
    every, occupancy = [], []
    with jax.set_mesh(layout) if layout else contextlib.nullcontext():
        for start in range(0, len(prompts), size):
            # The sampler folds row numbers into a key; numbers from 2^29 on are free.
            group_key = jax.random.fold_in(key, (1 << 30) + start) if start else key
            out = generate(
                model,
                params,
                prompts[start : start + size],
                key=group_key,
                samples=samples,
                cache_dtype=cache_dtype,
                keep=generations > 1,
                **options,
            )
            occupancy.append(out.occupancy)
            active = [_Row() for _ in range(out.tokens.shape[0])]
            every += active
            for turn in range(1, generations + 1):
                while not out.tokens.is_ready():  # sleep here, so that Ctrl-C works
                    time.sleep(0.002)
                arrays = sharding.fetch_to_hosts((out.tokens, out.logps, out.lengths))
                for row, tokens, logps, n in zip(active, *arrays, strict=True):
                    new = slice(len(row.appended), n)
                    row.add_turn(tokenizer, tokens[new].tolist(), logps[new].tolist())
                calling = [row for row in active if row.program is not None]
                calls = interpreter([row.program or "" for row in calling])
                for row, call in zip(calling, calls, strict=True):
                    row.add_output(tokenizer, call)
                if not calling or turn == generations:
                    break
                going = [i for i, row in enumerate(active) if row.program is not None]
                out, active = _select_rows(out, going, multiple), calling
                out = continue_rollouts(
                    model,
                    params,
                    out,
                    [row.appended for row in active],
                    key=jax.random.fold_in(group_key, (1 << 29) + turn),
                    **options,
                )
    return _as_solutions(every, float(np.mean(sharding.fetch_to_hosts(occupancy))))


def _select_rows(out: Rollouts, rows: Sequence[int], multiple: int) -> Rollouts:
    """Selects rows and moves them into fewer slots, so that the others cost nothing."""
    size = -(-bucket_length(len(rows), smallest=8) // multiple) * multiple
    size = min(out.cache.token.shape[0], size)
    index = np.array([*rows, *[rows[0]] * (size - len(rows))])
    cache = select_slots(out.cache, index)
    return dataclasses.replace(out, tokens=out.tokens[index[: len(rows)]], cache=cache)


def _as_solutions(rows: Sequence[_Row], occupancy: float) -> Solutions:
    lengths = np.array([len(row.tokens) for row in rows], np.int32)

    def padded(name: str, dtype: Any) -> np.ndarray:
        table = np.zeros((len(rows), lengths.max()), dtype)
        for row, values, n in zip(rows, table, lengths, strict=True):
            values[:n] = getattr(row, name)
        return table

    return Solutions(
        tokens=padded("tokens", np.int32),
        logps=padded("logps", np.float32),
        mask=padded("mask", bool),
        lengths=lengths,
        finished=np.array([row.finished for row in rows]),
        occupancy=occupancy,
        calls=[row.calls for row in rows],
    )


def max_output_tokens(generations: int, max_new_tokens: int) -> int:
    """Returns the most tokens that an output can have, the interpreter's included.

    `generations` = 0 means no tools: the output is one generation.

    >>> max_output_tokens(0, 1024), max_output_tokens(2, 1024)
    (1024, 2368)
    """
    if not generations:
        return max_new_tokens
    return generations * (max_new_tokens + OUTPUT_TOKENS)


# -- the text of an output -------------------------------------------------------------


def decode_output(
    tokenizer: Tokenizer, tokens: Sequence[int], mask: Sequence[Any]
) -> str:
    """Decodes an output.

    If the model opened an "```output" without a program before it, the text ends there.

    Args:
      tokenizer: the model's tokenizer.
      tokens: token ids of the output.
      mask: for each of them whether it was sampled.
    """
    text = tokenizer.decode(tokens)
    turn = max((i for i, sampled in enumerate(mask, 1) if not sampled), default=0)
    if STOP in tokenizer.decode(tokens[turn:]):
        text = text[: text.rindex(STOP)]
    return text
