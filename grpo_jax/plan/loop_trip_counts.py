"""How often the loops of a step run, for assumed lengths of prompts and outputs.

XLA knows the length of a loop that comes from a shape. The others depend on values.
They are identified by their scope (`jax.named_scope`), and this module gives each a
trip count: the sampler's `turns` and `last_turns`, the `rounds` of prompts that a turn
reads, the `micro_batches` of a pass, and the `pairs` of blocks that attention without a
kernel visits. A conditional gets the share of runs that take it: the `blocks` of
columns that a turn reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from grpo_jax.config import Config
from grpo_jax.distributed import sharding
from grpo_jax.generation.kv_cache import block_size, ring_blocks
from grpo_jax.generation.rollout_shapes import RolloutShape
from grpo_jax.models.kernels.tuning import loop_widths
from grpo_jax.models.kernels.xla import BLOCK
from grpo_jax.training.rl_programs import BatchLayout


@dataclasses.dataclass(frozen=True)
class MeanLengths:
    """Assumed mean lengths, in tokens."""

    prompt: float
    output: float

    @classmethod
    def for_config(
        cls, config: Config, prompt: float | None, output: float | None
    ) -> MeanLengths:
        """Returns the given lengths; by default 1/8 of a prompt, 1/2 of an output."""
        return cls(
            prompt or config.data.max_prompt_tokens / 8,
            output or config.max_new_tokens / 2,
        )


def sampler_trip_counts(
    config: Config, shape: RolloutShape, groups: int, lengths: MeanLengths
) -> dict[str, float]:
    """Returns trip counts of a rollout: slots are full, then one output is left.

    Args:
      config: the run's.
      shape: of the rollout's arrays.
      groups: how many groups of devices share the rows.
      lengths: what is assumed of prompts and outputs.

    Returns:
      scope → count.
    """
    rows = shape.prompts // groups * shape.samples
    slots, longest = min(rows, shape.slots), config.max_new_tokens
    alone = longest - lengths.output
    narrower = len(loop_widths(slots, "tpu")) - 1
    turns = rows / slots * lengths.output
    return {
        "turns": turns if narrower else turns + alone,
        "last_turns": alone / narrower if narrower else 0,
        "blocks": share_of_blocks_read(queue=slots < rows),
        "rounds": 1,
        "pairs": block_pairs(shape.prompts // groups, shape.width),
    }


def pass_trip_counts(
    layout: BatchLayout, config: Config, lengths: MeanLengths
) -> dict[str, float]:
    """Returns trip counts of a pass over a batch, whose packed rows are 95 % full."""
    outputs = config.questions_per_step * config.group_size
    room = 0.95 * layout.length - lengths.prompt
    rows = outputs * lengths.output / max(room, lengths.output)
    batches = min(layout.capacity, math.ceil(rows / layout.rows))
    each = layout.rows // sharding.rows_multiple(layout.mesh)
    return {"micro_batches": batches, "pairs": block_pairs(each, layout.length)}


def block_pairs(rows: int, length: int) -> float:
    """Returns the pairs of attention blocks in rows of one sequence each.

    Args:
      rows: of one device.
      length: of a row, in tokens.
    """
    blocks = -(-length // BLOCK)
    return rows * blocks * (blocks + 1) / 2


def share_of_blocks_read(queue: bool) -> float:
    """Returns the mean share of the cache's full blocks that a turn reads.

    Where outputs wait in a queue the slots are of all ages, and a turn reads them all.
    """
    return 1.0 if queue else 0.5


def columns_per_turn(tokens: int, queue: bool) -> float:
    """Returns the mean number of cache columns that a turn reads."""
    others = share_of_blocks_read(queue) * ring_blocks(tokens, queue)
    return (others + 1) * block_size(tokens)


def conditional_share(scope: str, trips: Mapping[str, float] | None) -> float:
    """Returns how often a conditional takes its most expensive branch; 1 by default."""
    name = scope.removesuffix("/cond").rpartition("/")[2]
    return (trips or {}).get(name, 1.0)


def loop_trip_count(scope: str, trips: Mapping[str, float] | None) -> float:
    """Returns the trip count of a loop, by the last name of its scope.

    Args:
      scope: of the loop, as "jit(f)/turns/while".
      trips: scope → count.

    Raises:
      KeyError: `trips` does not have it.
    """
    name = scope.removesuffix("/while").rpartition("/")[2]
    if not trips or name not in trips:
        raise KeyError(scope or "a loop without a name")
    return trips[name]
