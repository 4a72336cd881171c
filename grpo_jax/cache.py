"""What the slots hold, and attention to it.

A prompt's keys and values stand once, in `Prefixes`, and every row that goes on from it
reads them there: so many rows at a time as one matrix product. What a row adds stands
in its slot's columns. All slots write the same column at the same turn, and columns are
used in a circle: a slot's row has its newest tokens in the columns before the present
one, `places` says which of them are its own. Attention reads the blocks of columns back
to the oldest row that is being decoded, and no others.

Axes: W slots, P prompts, S positions of a prompt, X blocks of columns, B columns of
one, E entries (prompts with R slots each), e of them at once, K key heads, G query
heads per key head, M = R·G, Q = K·G, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 32  # B
TOGETHER = 8  # R at most: rows of a prompt whose scores are one matrix product
_F32: Any = dict(preferred_element_type=jnp.float32)
Layer = tuple[Array, Array]  # keys and values


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths", "layers"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Prefixes:
    """The prompts, each without its last token, which goes in with every row."""

    lengths: Array  # [P] int32
    layers: tuple[Layer, ...]  # [P, K, S, H] each


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "turn",
        "token",
        "position",
        "began",
        "prompt",
        "places",
        "layers",
        "prefixes",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the slots hold: all a row's tokens but the last, which is yet to go in."""

    turn: Array  # [] int32, the column that is written next, counted without end
    token: Array  # [W] int32
    position: Array  # [W] int32, where it will go
    began: Array  # [W] int32, the turn when the slot got its row
    prompt: Array  # [W] int32, of the slot's row
    places: Array  # [W, X·B] int32, the position that a column holds; -1: none
    layers: tuple[Layer, ...]  # [X, W, K, B, H] each
    prefixes: Prefixes

    @property
    def columns(self) -> int:
        return self.places.shape[1]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which slots go on from which prompt: entries of R slots with one prompt."""

    prompts: Array  # [E]
    slots: Array  # [E, R]; W: none
    where: Array  # [W] a slot's place among the E·R
    rounds: Array  # [] how many times `at_once` entries hold any slot
    at_once: int


def plan_of(cache: Cache, live: Bool[Array, "W"], together: int) -> Plan:
    slots, index = len(live), jnp.arange(len(live))
    at_once = max(1, slots // together)
    # Slots by their prompt, those without a row last.
    prompt = jnp.where(live, cache.prompt, 2**30)
    order = jnp.argsort(prompt, stable=True)
    ordered = prompt[order]
    changes = jnp.pad(ordered[1:] != ordered[:-1], (1, 0), constant_values=True)
    within = index - jax.lax.cummax(jnp.where(changes, index, 0))
    entry = jnp.cumsum(within % together == 0) - 1
    place = entry * together + within % together
    entries = -(-slots // at_once) * at_once
    filled = jnp.full(entries * together, slots).at[place].set(order)
    return Plan(
        prompts=jnp.zeros(entries, jnp.int32).at[entry].set(cache.prompt[order]),
        slots=filled.reshape(entries, together),
        where=jnp.zeros(slots, jnp.int32).at[order].set(place),
        rounds=-(-jnp.max(jnp.where(live[order], entry + 1, 0)) // at_once),
        at_once=at_once,
    )


Parts = tuple[Array, Array, Array]  # greatest score, sum of weights, weighted values


def of_prefix(
    q: Float[Array, "W K G H"],
    layer: Layer,
    lengths: Int[Array, "P"],
    position: Int[Array, "W"],
    plan: Plan,
    window: int | None,
) -> Parts:
    """Attention to the prompts, each read once for R of its rows."""
    slots, kv_heads, groups, head_dim = q.shape
    entries, together = plan.slots.shape
    size = plan.at_once
    step = jnp.arange(layer[0].shape[2])

    def some(turn, parts):
        def here(x):
            return jax.lax.dynamic_slice_in_dim(x, turn * size, size)

        prompts, rows = here(plan.prompts), here(plan.slots)
        keys, values = (x[prompts].astype(q.dtype) for x in layer)  # [e, K, S, H]
        mine = q.at[rows].get(mode="fill", fill_value=0)  # [e, R, K, G, H]
        mine = mine.swapaxes(1, 2).reshape(size, kv_heads, together * groups, head_dim)
        scores = jnp.einsum("eKSH,eKMH->eKMS", keys, mine, **_F32)
        scores = scores.reshape(size, kv_heads, together, groups, -1)
        seen = step[None, None] < lengths[prompts][:, None, None]  # [e, R, S]
        if window is not None:
            at = position.at[rows].get(mode="fill", fill_value=0)
            seen = seen & (at[..., None] - step[None, None] < window)
        scores = scores / math.sqrt(head_dim)
        scores = jnp.where(seen[:, None, :, None], scores, -1e30)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        flat = weights.reshape(size, kv_heads, together * groups, -1)
        out = jnp.einsum("eKMS,eKSH->eKMH", flat.astype(q.dtype), values, **_F32)
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


def attend(
    q: Float[Array, "W 1 Q H"],
    parts: Parts,
    keys: Float[Array, "X W K B H"],
    values: Float[Array, "X W K B H"],
    cache: Cache,
    window: int | None,
    blocks: tuple[Array, Array],
) -> Float[Array, "W 1 Q H"]:
    """Softmax over the prompt, which is in `parts`, and then block after block."""
    count, slots, kv_heads, size, head_dim = keys.shape
    q = q.reshape(slots, kv_heads, -1, head_dim)

    def add(number, carry):
        top, total, out = carry
        block = number % count
        k, v = (
            jax.lax.dynamic_index_in_dim(table, block, 0, False).astype(q.dtype)
            for table in (keys, values)
        )
        at = jax.lax.dynamic_slice_in_dim(cache.places, block * size, size, 1)  # [W, B]
        seen = at >= 0
        if window is not None:
            seen &= cache.position[:, None] - at < window
        # Keys first: the product that CPUs do fastest.
        scores = jnp.einsum("WKBH,WKGH->WKBG", k, q, **_F32) / math.sqrt(head_dim)
        scores = jnp.where(seen[:, None, :, None], scores, -1e30).swapaxes(2, 3)
        now = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, fade = jnp.exp(scores - now), jnp.exp(top - now)
        total = total * fade + weights.sum(-1, keepdims=True)
        taken = jnp.einsum("WKGB,WKBH->WKGH", weights.astype(v.dtype), v, **_F32)
        return now, total, out * fade + taken

    with jax.named_scope("blocks"):
        _, total, out = jax.lax.fori_loop(*blocks, add, parts)
    return (out / total).astype(q.dtype).reshape(slots, 1, -1, head_dim)


def blocks_of(cache: Cache, live: Array) -> tuple[Array, Array]:
    """The blocks back to the oldest row: [first, end), to be taken in the circle."""
    oldest = jnp.min(jnp.where(live, cache.began, cache.turn))
    return oldest // BLOCK, cache.turn // BLOCK + 1


def blocks_for(tokens: int) -> int:
    """X that hold a row of so many tokens while its first and last block are shared."""
    return -(-tokens // BLOCK) + 1


def grow(cache: Cache, tokens: int) -> Cache:
    """Columns for so many further tokens, where no column was used twice."""
    more = blocks_for(tokens)
    return dataclasses.replace(
        cache,
        places=jnp.pad(cache.places, ((0, 0), (0, more * BLOCK)), constant_values=-1),
        layers=jax.tree.map(
            lambda x: jnp.pad(x, ((0, more), *((0, 0),) * 4)), cache.layers
        ),
    )
