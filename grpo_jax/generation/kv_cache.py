"""The KV cache of the decode loop.

The keys and values of a prompt are stored once, in `Prefixes`, and all rows that
continue the prompt read them there. Those of sampled tokens are stored per slot, in
blocks of B columns. At each turn all slots write the same column of the last
block. When that block is full, it moves into a ring buffer of X other blocks. `places`
gives each column's position in the slot's current row. Each block is an array of its
own, so that it is read without a copy. `cache_attention.py` attends to the cache.

Axes: W slots, P prompts, S prompt positions, X + 1 blocks of B columns each, K key
heads, H head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from grpo_jax.distributed import sharding

Pair = tuple[Array, Array]  # keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Keys and values of the prompts without their last token.

    The last token is the first input of every row that continues the prompt.
    """

    lengths: Array  # [P] int32
    layers: tuple[Pair, ...]  # per layer [P, K, H, S] and [P, K, S, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of each slot's row, except of its last token.

    The last token, `token`, is the input of the next turn.
    """

    turn: Array  # [] int32, how many columns were written so far
    token: Array  # [W] int32, the next input
    position: Array  # [W] int32, its position in the row
    began: Array  # [W] int32, the turn when the slot got its row
    prompt: Array  # [W] int32, the prompt of the slot's row
    places: tuple[Array, ...]  # [W, B] int32 each, a column's position; -1 if unused
    layers: tuple[tuple[Pair, ...], ...]  # per block [W, K, H, B] and [W, K, B, H]
    prefixes: Prefixes

    @property
    def block(self) -> int:
        """B, the columns of a block."""
        return self.places[0].shape[1]

    @property
    def columns(self) -> int:
        """The columns of all blocks, (X + 1)·B."""
        return len(self.places) * self.block


def next_column(cache: Cache, live: Bool[Array, "W"]) -> Cache:
    """Returns the cache with this turn's column assigned to the slots' positions.

    If the last block is full, it first moves into the ring buffer of the others.
    """
    at = cache.turn % cache.block
    *others, last = zip(cache.places, *cache.layers, strict=True)
    full = (at == 0) & (cache.turn > 0)
    index = (cache.turn // cache.block - 1) % max(len(others), 1)
    others = [
        jax.lax.cond(full & (index == i), lambda _: last, lambda block: block, block)
        for i, block in enumerate(others)
    ]
    here = jnp.where(live, cache.position, -1)[:, None]
    places = jax.lax.dynamic_update_slice_in_dim(
        jnp.where(full, -1, last[0]), here, at, 1
    )
    places, *layers = zip(*others, (places, *last[1:]), strict=True)
    return dataclasses.replace(cache, places=places, layers=tuple(layers))


def block_size(tokens: int) -> int:
    """Returns B for rows of so many tokens, so that blocks are few and mostly used.

    >>> [block_size(n) for n in (20, 128, 512, 1024, 4096)]
    [32, 64, 64, 128, 512]
    """
    size = 32
    while size < min(tokens, 64) or size * 8 < tokens:
        size *= 2
    return size


def ring_blocks(tokens: int, queue: bool) -> int:
    """Returns X for rows of so many tokens.

    With a queue a row may start in the middle of a block, and then needs one more.

    >>> ring_blocks(128, queue=False), ring_blocks(128, queue=True)
    (1, 2)
    """
    size = block_size(tokens)
    return -(-(tokens - 1) // size) if queue else (tokens - 1) // size


def make_empty_cache(slots: int, tokens: int, queue: bool, prefixes: Prefixes) -> Cache:
    """Returns a cache whose slots have no row.

    Args:
      slots: W.
      tokens: most new tokens of a row.
      queue: whether slots get further rows when one ends.
      prefixes: the prompts' keys and values, which also give shapes and dtype.
    """
    keys, values = prefixes.layers[0]
    heads, width, size = *keys.shape[1:3], block_size(tokens)
    count = ring_blocks(tokens, queue) + 1
    rows = sharding.P(*sharding.BATCH, "tensor")
    pair = (
        jnp.zeros((slots, heads, width, size), keys.dtype),
        jnp.zeros((slots, heads, size, width), values.dtype),
    )
    pair = jax.tree.map(lambda x: sharding.constrain(x, rows), pair)
    zeros = jnp.zeros(slots, jnp.int32)
    return Cache(
        turn=jnp.int32(0),
        token=zeros,
        position=zeros,
        began=zeros,
        prompt=zeros,
        places=(jnp.full((slots, size), -1, jnp.int32),) * count,
        layers=((pair,) * count,) * len(prefixes.layers),
        prefixes=prefixes,
    )


@jax.jit
def select_slots(cache: Cache, index: Int[Array, "V"]) -> Cache:
    """Returns the cache of the slots `index` [V], in that order."""
    names = ("token", "position", "began", "prompt", "places", "layers")
    chosen: Any = {
        name: jax.tree.map(lambda x: x[index], getattr(cache, name)) for name in names
    }
    return dataclasses.replace(cache, **chosen)


def grow(cache: Cache, tokens: int) -> Cache:
    """Adds blocks for so many further tokens.

    The ring buffer must not have wrapped around: no column was written twice.
    """
    more = -(-tokens // cache.block)
    *others, last = cache.places
    layers = tuple((*blocks[:-1], *blocks[-1:] * (more + 1)) for blocks in cache.layers)
    places = (*others, *(jnp.full_like(last, -1),) * more, last)
    return dataclasses.replace(cache, places=places, layers=layers)


def join_blocks(blocks: Sequence[Array], turn: Array, axis: int) -> Array:
    """Concatenates the blocks in the order of their columns.

    The ring buffer must not have wrapped around.

    Args:
      blocks: keys, values or places of each block.
      turn: [] int32, the cache's turn.
      axis: the axis of the columns.

    Returns:
      One array with (X + 1)·B columns.
    """
    *others, last = blocks
    size = last.shape[axis]
    at = jnp.maximum(turn - 1, 0) // size * size
    flat = jnp.concatenate((*others, jnp.full_like(last, -1)), axis)
    return jax.lax.dynamic_update_slice_in_dim(flat, last, at, axis)


def split_into_blocks(
    flat: Array, count: int, turn: Array, axis: int
) -> tuple[Array, ...]:
    """Returns `count` blocks of concatenated columns; the inverse of `join_blocks`.

    Args:
      flat: the columns, along `axis`.
      count: how many blocks they are.
      turn: [] int32, the turn, whose block comes last.
      axis: the axis of the columns.
    """
    size = flat.shape[axis] // count
    at = jnp.maximum(turn - 1, 0) // size * size
    last = jax.lax.dynamic_slice_in_dim(flat, at, size, axis)
    return (*jnp.split(flat, count, axis)[:-1], last)
