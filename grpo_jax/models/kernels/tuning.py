"""Sizes and shapes of programs that depend on the platform, without being kernels."""

from __future__ import annotations

from grpo_jax.distributed.sharding import platform

# Logits that a device holds at a time: 256 MiB of float32 for a matrix unit, since each
# chunk reads and writes the gradient of the whole output matrix.
_LOGITS = {"cpu": 2**24, "gpu": 2**26, "tpu": 2**26}
# Of these the tokens of one tile. A CPU does all positions of a tile while it is in its
# cache, and touches each row of the output matrix's gradient once.
_TILE = {"cpu": 1024}


def logits_at_once() -> int:
    """Returns how many float32 logits a device should hold at a time."""
    return _LOGITS[platform()]


def vocabulary_tile(vocabulary: int) -> int:
    """Returns how many tokens of a vocabulary have their logits computed together."""
    return min(vocabulary, _TILE.get(platform(), vocabulary))


def unrolls_layers(layers: int) -> bool:
    """Returns whether a scan over so many layers should be unrolled.

    A scan keeps compiling short. A few layers are faster side by side, as XLA's CPU
    backward pass of a scan copies what it has stacked.
    """
    return layers <= 4 and platform() == "cpu"


def loop_widths(slots: int, on: str | None = None) -> tuple[int, ...]:
    """Returns the slots of the decode loops, one after the other.

    A narrower loop goes on with the last rows, where it is worth a program. On a CPU a
    row more costs nearly as much as the row before.

    Args:
      slots: of the first loop.
      on: the platform; None: this program's.

    >>> loop_widths(32, "tpu"), loop_widths(12, "tpu"), loop_widths(64, "cpu")
    ((32, 16, 8), (12,), (64, 56, 48, 32, 16))
    """
    many = slots >= 64 and (on or platform()) == "cpu"
    eighths = (8, 7, 6, 4, 2) if many else (8, 4, 2)
    return tuple(slots * n // 8 for n in eighths if n == 8 or slots * n // 8 >= 8)
