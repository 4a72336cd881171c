"""Sizes and program shapes that depend on the platform, outside the kernels."""

from __future__ import annotations

from grpo_jax.distributed import sharding

# Logits that a device holds at a time. Each chunk reads and writes the gradient of the
# whole output matrix, so accelerators take large chunks: 256 MiB of float32.
_LOGITS = {"cpu": 2**24, "gpu": 2**26, "tpu": 2**26}
# Tokens of the vocabulary in one tile. A CPU handles all positions of a tile while the
# tile is in its cache, and touches each row of the output matrix's gradient once.
_TILE = {"cpu": 1024}


def logits_at_once() -> int:
    """Returns how many float32 logits a device should hold at a time."""
    return _LOGITS[sharding.platform()]


def vocabulary_tile(vocabulary: int) -> int:
    """Returns how many tokens of a vocabulary make one tile of logits."""
    return min(vocabulary, _TILE.get(sharding.platform(), vocabulary))


def unrolls_layers(layers: int) -> bool:
    """Returns whether a scan over so many layers should be unrolled.

    A scan compiles faster. A few layers run faster unrolled on a CPU, because XLA's
    backward pass of a scan copies the stacked arrays there.
    """
    return layers <= 4 and sharding.platform() == "cpu"


def loop_widths(slots: int, on: str | None = None) -> tuple[int, ...]:
    """Returns the numbers of slots of successive decode loops.

    When few rows are left, a narrower loop continues with them, if that is worth
    compiling another program. On a CPU the time is nearly proportional to the slots,
    so it has more loops.

    Args:
      slots: the number of slots of the first loop.
      on: the platform; None: the current one.

    >>> loop_widths(32, "tpu"), loop_widths(12, "tpu"), loop_widths(64, "cpu")
    ((32, 16, 8), (12,), (64, 56, 48, 32, 16))
    """
    many = slots >= 64 and (on or sharding.platform()) == "cpu"
    eighths = (8, 7, 6, 4, 2) if many else (8, 4, 2)
    return tuple(slots * n // 8 for n in eighths if n == 8 or slots * n // 8 >= 8)
