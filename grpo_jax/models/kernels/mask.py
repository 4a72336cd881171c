"""The attention mask of packed rows, defined once for every kernel.

A query attends to itself, and to earlier tokens that are real, in the window, and in
its own segment or the prompt that its segment shares.

Axes: B rows, T positions, X blocks of a row, t and s positions of a block of queries
and of keys.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

PROMPT = 1 << 16  # the segment of a shared prompt is a multiple of this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Packed-row metadata that defines the attention mask.

    >>> segments, positions = jnp.array([[1, 2, 2]]), jnp.arange(3)[None]
    >>> rows = AttentionMask(jnp.ones((1, 3), bool), segments, positions)
    >>> rows.allowed().astype(int).tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]
    """

    real: Array  # bool [B, T]: not padding
    # int32 [B, T], numbered as `training.packing` does; None: one segment a row
    segments: Array | None
    positions: Array  # int32 [B, T]
    # a query's and a key's positions differ by less
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def allowed(
        self,
        start: Any = 0,
        count: int | None = None,
        key_start: Any = 0,
        key_count: int | None = None,
    ) -> Bool[Array, "B t s"]:
        """Returns the mask between a range of queries and a range of keys.

        Every query attends to itself, even in padding, so no softmax is over nothing.

        Args:
          start: the first query; may be traced.
          count: the number of queries, t; None: all.
          key_start: the first key; may be traced.
          key_count: the number of keys, s; None: all.

        Returns:
          bool [B, t, s], True where the query may attend to the key.
        """
        length = self.real.shape[1]

        def pairs(x: Array) -> tuple[Array, Array]:
            mine = _slice_positions(x, start, length if count is None else count)
            theirs = _slice_positions(
                x, key_start, length if key_count is None else key_count
            )
            return mine[:, :, None], theirs[:, None]

        mine, theirs = pairs(jnp.arange(length)[None])
        allowed = (mine > theirs) & pairs(self.real)[1]
        if self.segments is not None:
            of = pairs(self.segments)
            allowed &= (of[0] == of[1]) | shares_prompt(*of)
        if self.window is not None:
            at = pairs(self.positions)
            allowed &= at[0] - at[1] < self.window
        return allowed | (mine == theirs)


def _slice_positions(x: Array, start: Any, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)


def shares_prompt(mine: Int[Array, "..."], theirs: Int[Array, "..."]) -> Array:
    """Returns whether a key's segment is the prompt that a query's segment continues.

    Prompt g, shared by several outputs, is segment g·2^16. The outputs that continue it
    are segments g·2^16 + 1 and above (`training.packing.pack` with share_prompts).
    Plain segments are below 2^16, and segment 0 is padding.

    Args:
      mine: segments of queries, int32.
      theirs: segments of keys, int32, broadcastable to `mine`.
    """
    is_prompt = (theirs % PROMPT == 0) & (theirs > 0)
    return is_prompt & (mine // PROMPT == theirs // PROMPT)


def pad_positions(tree: Any, missing: int) -> Any:
    """Appends `missing` zero positions to every [B, T, …] array of a tree.

    In an `AttentionMask` these are not real, and in segment 0.
    """
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)), tree
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs (block of queries, block of keys) in which a token may attend.

    Pairs of the same block of queries are next to each other. The arrays have room for
    all causal pairs; only the first `count` entries are used.
    """

    row: Array  # int32 [most], the row of the batch
    queries: Array  # int32 [most], the block of queries in its row
    keys: Array  # int32 [most], the block of keys in its row
    count: Array  # int32 []


def visible_block_pairs(rows: AttentionMask, size: int) -> Pairs:
    """Returns the pairs of blocks in which any query may attend to any key.

    Args:
      rows: metadata that defines the attention mask.
      size: positions of a block; divides T.
    """
    batch, length = rows.real.shape
    blocks = length // size

    def sees(start: Array) -> Array:  # [B, X], for one block of queries
        allowed = rows.allowed(start, size)
        return allowed.reshape(batch, size, blocks, size).any((1, 3))

    seen = jax.lax.map(sees, size * jnp.arange(blocks)).swapaxes(0, 1)
    most = batch * blocks * (blocks + 1) // 2  # keys are never later
    first = jnp.argsort(~seen.reshape(-1), stable=True)[:most].astype(jnp.int32)
    row, rest = first // blocks**2, first % blocks**2
    return Pairs(row, rest // blocks, rest % blocks, seen.sum(dtype=jnp.int32))
