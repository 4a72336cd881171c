"""Attention of a decode turn to the cache, by XLA.

A prompt's keys and values are read once for several of its rows, as one matrix product.
The blocks that a row added are read back to the oldest row that is being decoded.

Axes: W slots, P prompts, S positions of a prompt, X + 1 blocks of columns, B columns of
one, E entries (prompts with R slots each), e of them at once, K key heads, G query
heads per key head, M = R·G, Q = K·G, H head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.generation.kv_cache import Cache, Pair
from grpo_jax.models.kernels.products import einsum

ROWS_PER_PRODUCT = 8  # most rows R of a prompt that share one matrix product


@dataclasses.dataclass(frozen=True)
class SlotGroups:
    """Slots grouped by prompt: each entry has up to R slots of one prompt."""

    prompts: Array  # [E]
    slots: Array  # [E, R]; W where an entry has fewer slots
    where: Array  # [W] index of the slot among the E·R
    rounds: Array  # [] how many rounds of `at_once` entries hold a slot
    at_once: int  # e


def group_slots_by_prompt(
    cache: Cache, live: Bool[Array, "W"], together: int
) -> SlotGroups:
    """Returns the slots grouped by prompt, with at most `together` (R) in an entry."""
    slots, index = len(live), jnp.arange(len(live))
    at_once = max(1, slots // together)
    # Slots in the order of their prompts; slots without a row are last.
    prompt = jnp.where(live, cache.prompt, 2**30)
    order = jnp.argsort(prompt, stable=True)
    ordered = prompt[order]
    changes = jnp.pad(ordered[1:] != ordered[:-1], (1, 0), constant_values=True)
    within = index - jax.lax.cummax(jnp.where(changes, index, 0))
    entry = jnp.cumsum(within % together == 0) - 1
    place = entry * together + within % together
    entries = -(-slots // at_once) * at_once
    filled = jnp.full(entries * together, slots).at[place].set(order)
    return SlotGroups(
        prompts=jnp.zeros(entries, jnp.int32).at[entry].set(cache.prompt[order]),
        slots=filled.reshape(entries, together),
        where=jnp.zeros(slots, jnp.int32).at[order].set(place),
        rounds=-(-jnp.max(jnp.where(live[order], entry + 1, 0)) // at_once),
        at_once=at_once,
    )


Parts = tuple[Array, Array, Array]  # largest score, sum of weights, weighted values


def attend_to_prompts(
    q: Float[Array, "W K G H"],
    layer: Pair,
    lengths: Int[Array, "P"],
    position: Int[Array, "W"],
    plan: SlotGroups,
    window: int | None,
) -> Parts:
    """Returns the part of attention over the prompts, each read once for R rows.

    Args:
      q: [W, K, G, H] queries of this turn.
      layer: keys [P, K, H, S] and values [P, K, S, H] of the prompts in this layer.
      lengths: [P] int32, positions of each prompt.
      position: [W] int32, position of each query in its row.
      plan: the slots grouped by prompt.
      window: the sliding window in tokens, or None.

    Returns:
      float32 terms of an online softmax: the largest score [W, K, G, 1], the sum of
      weights [W, K, G, 1] and the weighted sum of values [W, K, G, H].
    """
    slots, kv_heads, groups, head_dim = q.shape
    entries, together = plan.slots.shape
    size = plan.at_once
    step = jnp.arange(layer[1].shape[2])

    def some(turn, parts):
        def here(x):
            return jax.lax.dynamic_slice_in_dim(x, turn * size, size)

        prompts, rows = here(plan.prompts), here(plan.slots)
        mine = q.at[rows].get(mode="fill", fill_value=0)  # [e, R, K, G, H]
        mine = mine.swapaxes(1, 2).reshape(size, kv_heads, together * groups, head_dim)

        keys, values = (x[prompts].astype(q.dtype) for x in layer)
        scores = einsum("EKHS,EKMH->EKMS", keys, mine)
        scores = scores.reshape(size, kv_heads, together, groups, -1)
        seen = step[None, None] < lengths[prompts][:, None, None]  # [e, R, S]
        if window is not None:
            at = position.at[rows].get(mode="fill", fill_value=0)
            seen = seen & (at[..., None] - step[None, None] < window)
        scores = scores / math.sqrt(head_dim)
        scores = jnp.where(seen[:, None, :, None], scores, -1e30)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        flat = weights.reshape(size, kv_heads, together * groups, -1).astype(q.dtype)
        out = einsum("EKMS,EKSH->EKMH", flat, values)
        found = (top, weights.sum(-1, keepdims=True), out.reshape(*top.shape[:4], -1))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(
                table, x.swapaxes(1, 2), turn * size, axis=0
            )
            for table, x in zip(parts, found, strict=True)
        )

    shape = (entries, together, kv_heads, groups)
    zero = jnp.zeros((*shape, 1), jnp.float32)
    empty = (zero - 1e30, zero, jnp.zeros((*shape, head_dim), jnp.float32))
    with jax.named_scope("rounds"):
        parts = jax.lax.fori_loop(0, plan.rounds, some, empty)
    top, total, out = (
        x.reshape(entries * together, *shape[2:], -1)[plan.where] for x in parts
    )
    return top, total, out


def attend_to_blocks(
    q: Float[Array, "W 1 Q H"],
    parts: Parts,
    blocks: Sequence[Pair],
    cache: Cache,
    window: int | None,
    reads: Bool[Array, "X"],
) -> Float[Array, "W 1 Q H"]:
    """Completes attention: adds the blocks to the prompt's `parts`, one by one.

    Args:
      q: [W, 1, Q, H] queries of this turn.
      parts: the prompt's terms, from `attend_to_prompts`.
      blocks: keys [W, K, H, B] and values [W, K, B, H] of each block in this layer.
      cache: gives the position of each column and of the queries.
      window: the sliding window in tokens, or None.
      reads: [X] bool, which of the full blocks to read (`blocks_to_read`).

    Returns:
      [W, 1, Q, H], in the dtype of q.
    """
    slots, kv_heads = blocks[0][0].shape[:2]
    q = q.reshape(slots, kv_heads, -1, q.shape[-1])

    def add(parts, block, places):
        (top, total, out), (keys, values) = parts, block
        seen = places >= 0  # [W, B]
        if window is not None:
            seen &= cache.position[:, None] - places < window
        scores = einsum("WKGH,WKHB->WKGB", q, keys.astype(q.dtype))
        scores = scores / math.sqrt(q.shape[-1])
        scores = jnp.where(seen[:, None, None], scores, -1e30)
        now = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, fade = jnp.exp(scores - now), jnp.exp(top - now)
        total = total * fade + weights.sum(-1, keepdims=True)
        weights, values = weights.astype(q.dtype), values.astype(q.dtype)
        taken = einsum("WKGB,WKBH->WKGH", weights, values)
        return now, total, out * fade + taken

    *others, last = blocks
    # Branches and not a loop of zero or one turns: XLA would hoist the scores out of
    # the loop, as they do not change in it, and always compute them.
    with jax.named_scope("blocks"):
        for read, *block in zip(reads, others, cache.places[:-1], strict=True):
            parts = jax.lax.cond(read, add, lambda parts, *_: parts, parts, *block)
    _, total, out = add(parts, last, cache.places[-1])
    return (out / total).astype(q.dtype).reshape(slots, 1, -1, q.shape[-1])


def blocks_to_read(cache: Cache, live: Bool[Array, "W"]) -> Bool[Array, "X"]:
    """Returns [X] bool: which full blocks hold columns of a row still decoded."""
    last = cache.turn // cache.block
    oldest = jnp.min(jnp.where(live, cache.began, cache.turn)) // cache.block
    others = len(cache.places) - 1
    number = last - 1 - (last - 1 - jnp.arange(others)) % max(others, 1)
    return (number >= oldest) & (number >= 0)


def write_keys_and_values(
    blocks: Sequence[Pair], keys: Array, values: Array, cache: Cache
):
    """Writes this turn's keys and values into the last block.

    Args:
      blocks: keys [W, K, H, B] and values [W, K, B, H] of each block in a layer.
      keys: [W, 1, K, H].
      values: [W, 1, K, H].
      cache: gives the column to write.

    Returns:
      The blocks after writing.
    """
    *others, (old_keys, old_values) = blocks
    at = cache.turn % cache.block

    def put(table, x, axis):
        x = jnp.expand_dims(x[:, 0], axis).astype(table.dtype)
        return jax.lax.dynamic_update_slice_in_dim(table, x, at, axis)

    return (*others, (put(old_keys, keys, 3), put(old_values, values, 2)))


def make_attention(
    cache: Cache, live: Bool[Array, "W"], together: int, window: int | None
) -> Callable[..., tuple[Array, tuple[Pair, ...]]]:
    """Returns the attention function of this turn, to be called for each layer.

    Args:
      cache: the cache, with this turn's column prepared (`next_column`).
      live: [W] bool, slots that decode a row.
      together: R, most slots of a prompt per matrix product.
      window: the sliding window in tokens, or None.

    Returns:
      A function of a layer's queries [W, 1, Q, H], keys and values [W, 1, K, H], its
      prompts and its blocks. It returns the attention output [W, 1, Q, H] and the
      blocks with the new keys and values.
    """
    plan = group_slots_by_prompt(cache, live, together)
    reads = blocks_to_read(cache, live)

    def see(q, keys, values, prefix, blocks):
        blocks = write_keys_and_values(blocks, keys, values, cache)
        heads = q.reshape(len(live), keys.shape[2], -1, q.shape[-1])
        lengths = cache.prefixes.lengths
        parts = attend_to_prompts(heads, prefix, lengths, cache.position, plan, window)
        return attend_to_blocks(q, parts, blocks, cache, window, reads), blocks

    return see
