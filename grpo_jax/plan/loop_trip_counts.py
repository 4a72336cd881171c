"""How long the outputs are assumed to be, and how often loops then run.

In: a config's shapes and what is assumed of its prompts' and outputs' lengths. Out: a
number for the scope (`jax.named_scope`) of each loop whose length is a value and no
shape: `turns` and `last_turns` of the sampler, the `rounds` of prompts that a turn
reads, the `micro_batches` of a pass, the `pairs` of blocks that
attention without a kernel takes. What runs in some turns only has a share: the `blocks`
of columns that a turn reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from grpo_jax.config import Config
from grpo_jax.distributed import sharding
from grpo_jax.generation.kv_cache import block_size, others_for
from grpo_jax.generation.sampler import Shape, widths_of
from grpo_jax.models.kernels import attention
from grpo_jax.training.compiled_steps import Layout


@dataclasses.dataclass(frozen=True)
class Lengths:
    prompt: float  # tokens of a question, on average
    output: float  # tokens of an output, on average

    @classmethod
    def assumed(
        cls, config: Config, prompt: float | None, output: float | None
    ) -> Lengths:
        """What is not given: an eighth of the longest question, half an output."""
        return cls(
            prompt or config.data.max_prompt_tokens / 8,
            output or config.max_new_tokens / 2,
        )


def of_sampler(
    config: Config, shape: Shape, groups: int, lengths: Lengths
) -> dict[str, float]:
    """Turns as if slots were full until the end, and then the longest output alone."""
    rows = shape.prompts // groups * shape.samples
    slots, longest = min(rows, shape.slots), config.max_new_tokens
    alone = longest - lengths.output
    narrower = len(widths_of(slots, "tpu")) - 1
    turns = rows / slots * lengths.output
    return {
        "turns": turns if narrower else turns + alone,
        "last_turns": alone / narrower if narrower else 0,
        "blocks": blocks_read(queue=slots < rows),
        "rounds": 1,
        "pairs": pairs(shape.prompts // groups, shape.width),
    }


def of_pass(layout: Layout, config: Config, lengths: Lengths) -> dict[str, float]:
    """Micro-batches that hold anything: rows are full but for 5 %."""
    outputs = config.questions_per_step * config.group_size
    room = 0.95 * layout.length - lengths.prompt
    rows = outputs * lengths.output / max(room, lengths.output)
    batches = min(layout.capacity, math.ceil(rows / layout.rows))
    each = layout.rows // sharding.rows_multiple(layout.mesh)
    return {"micro_batches": batches, "pairs": pairs(each, layout.length)}


def pairs(rows: int, length: int) -> float:
    """Pairs of blocks in a device's rows, as if each were one sequence."""
    blocks = -(-length // attention.BLOCK)
    return rows * blocks * (blocks + 1) / 2


def blocks_read(queue: bool) -> float:
    """The share of the full blocks back to the oldest row, on average."""
    return 1.0 if queue else 0.5


def columns(tokens: int, queue: bool) -> float:
    """Columns that a turn reads, on average, of rows of up to so many tokens."""
    others = blocks_read(queue) * others_for(tokens, queue)
    return (others + 1) * block_size(tokens)


def share(scope: str, trips: Mapping[str, float] | None) -> float:
    """How often a conditional takes its dearest branch; 1 where nothing is said."""
    name = scope.removesuffix("/cond").rpartition("/")[2]
    return (trips or {}).get(name, 1.0)


def named(scope: str, trips: Mapping[str, float] | None) -> float:
    """The number of a loop, by the last name of the scope that it stands in."""
    name = scope.removesuffix("/while").rpartition("/")[2]
    if not trips or name not in trips:
        raise KeyError(scope or "a loop without a name")
    return trips[name]
