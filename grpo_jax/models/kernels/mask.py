"""Which token may attend to which: the one definition, for every kernel.

A query attends to what is earlier, real, of the same segment or of its shared prompt,
and in the window, and to itself.

Axes: B rows, T positions, X blocks of a row, t and s positions of a block of queries
and of keys.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

PROMPT = 1 << 16  # a shared prompt's segment is a multiple of it


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["real", "segments", "positions"],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Packed-row metadata that defines the attention mask.

    >>> segments, positions = jnp.array([[1, 2, 2]]), jnp.arange(3)[None]
    >>> rows = AttentionMask(jnp.ones((1, 3), bool), segments, positions)
    >>> rows.allowed().astype(int).tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]
    """

    real: Array  # bool [B, T]: not padding
    segments: (
        Array | None
    )  # int32 [B, T], as `training.packing` numbers them; None: one
    positions: Array  # int32 [B, T]
    window: int | None = None  # a query sees positions less than this before its own

    def allowed(
        self,
        start: Any = 0,
        count: int | None = None,
        key_start: Any = 0,
        key_count: int | None = None,
    ) -> Bool[Array, "B t s"]:
        """Whether `count` queries from `start` on see `key_count` keys, all by default.

        They see what is earlier, real, of the same sequence and in the window, and
        themselves: even padding sees something, so that every softmax is of a number.
        """
        length = self.real.shape[1]

        def pairs(x: Array) -> tuple[Array, Array]:
            mine = _part(x, start, length if count is None else count)
            theirs = _part(x, key_start, length if key_count is None else key_count)
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


def _part(x: Array, start: Any, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)


def shares_prompt(mine: Int[Array, "..."], theirs: Int[Array, "..."]) -> Array:
    """Whether a key's segment is the prompt that a query's segment goes on from.

    Prompt g, shared by several outputs, is segment g·2^16; what goes on from it is
    g·2^16 + 1 and above (`packing.pack` with share_prompts). Plain segments are below
    2^16, and segment 0 is padding.
    """
    is_prompt = (theirs % PROMPT == 0) & (theirs > 0)
    return is_prompt & (mine // PROMPT == theirs // PROMPT)


def pad_positions(tree: Any, missing: int) -> Any:
    """Every [B, T, …] with `missing` more positions, not real and of segment 0."""
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)), tree
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["queries", "keys", "row", "count"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Blocks that see each other; those of one block of queries stand together."""

    row: Array  # [most]
    queries: Array  # [most]
    keys: Array  # [most]
    count: Array  # [] so many of them are pairs


def pairs_of(rows: AttentionMask, size: int) -> Pairs:
    """Every pair of blocks of `size` positions of which one position sees one."""
    batch, length = rows.real.shape
    blocks = length // size

    def sees(start: Array) -> Array:  # [B, X] of one block of queries
        allowed = rows.allowed(start, size)
        return allowed.reshape(batch, size, blocks, size).any((1, 3))

    seen = jax.lax.map(sees, size * jnp.arange(blocks)).swapaxes(0, 1)
    most = batch * blocks * (blocks + 1) // 2  # no later keys
    first = jnp.argsort(~seen.reshape(-1), stable=True)[:most].astype(jnp.int32)
    row, rest = first // blocks**2, first % blocks**2
    return Pairs(row, rest // blocks, rest % blocks, seen.sum(dtype=jnp.int32))
