"""Decoding: the slots, their cache, and the loop that writes a token a turn.

In: a model, its parameters, a `State` and what refills its slots. Out: the state when
every row has ended. Pure; `rollout.py` and `continuation.py` start and read it.

Position p of a slot lies in block p // B of its cache at p % B. Attention reads the
blocks up to the longest row that is being decoded, and no others. What a slot's last
row left beyond the present one's end is never looked at.

Axes: N rows, W slots, C new positions, T appended positions, X blocks of the cache,
B positions of one, K key heads, G query heads per key head, Q = K·G, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.attention import attention
from grpo_jax.model import Decoder, Params, few_rows
from grpo_jax.sampling import Sampling

BLOCK = 32  # B
_F32: Any = dict(preferred_element_type=jnp.float32)
Layer = tuple[Array, Array]  # keys and values of all slots, each [W, X, K, B, H]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "logps",
        "mask",
        "lengths",
        "finished",
        "occupancy",
        "cache",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions, grouped by prompt; what follows a row's end is 0."""

    tokens: Any  # [N, C] int32
    logps: Any  # [N, C] float32, of the distribution that was sampled, in nats
    mask: Any  # [N, C] bool: sampled, the EOS token included
    lengths: Any  # [N] int32
    finished: Any  # [N] bool: ended with EOS or a stop sequence, not cut off
    occupancy: Any = None  # [] float32, the share of slots × turns that decoded
    cache: Any = None  # `Cache`, where it was kept


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["token", "position", "layers"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the slots hold: all a row's tokens but the last, which is yet to go in."""

    token: Array  # [W] int32
    position: Array  # [W] int32, where it will go
    layers: tuple[Layer, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["offered", "used", "queue", "row", "recent", "cache", "out"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    offered: Array  # [] slots × turns so far
    used: Array  # [] those that decoded a row
    queue: Array  # [] the next row to be given a slot
    row: Array  # [W] the row that a slot decodes; N: none
    recent: Array  # [W, longest stop sequence] its last tokens, -1 before them
    cache: Cache
    out: Rollouts


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends a row; sequences of token ids, all of whose tokens belong to it."""

    eos: tuple[int, ...]
    stop: tuple[tuple[int, ...], ...]
    limit: int  # C

    def reached(self, recent: Int[Array, "W R"]) -> Bool[Array, "W"]:
        ended = jnp.isin(recent[:, -1], jnp.array(self.eos, jnp.int32))
        for s in self.stop:
            ended |= (recent[:, -len(s) :] == jnp.array([s], jnp.int32)).all(1)
        return ended


def _attend(
    q: Float[Array, "W 1 Q H"],
    keys: Float[Array, "W X K B H"],
    values: Float[Array, "W X K B H"],
    position: Int[Array, "W"],
    window: int | None,
    blocks: tuple[Array, Array],
) -> Float[Array, "W 1 Q H"]:
    """Softmax over the positions up to the row's own, block after block."""
    slots, _, kv_heads, size, head_dim = keys.shape
    q = q.reshape(slots, kv_heads, -1, head_dim)

    def add(block, carry):
        top, total, out = carry
        k, v = (
            jax.lax.dynamic_index_in_dim(table, block, 1, False).astype(q.dtype)
            for table in (keys, values)
        )
        at = position[:, None] - (block * size + jnp.arange(size))[None]  # [W, B]
        seen = at >= 0 if window is None else (at >= 0) & (at < window)
        # Keys first: the product that CPUs do fastest.
        scores = jnp.einsum("WKBH,WKGH->WKBG", k, q, **_F32) / math.sqrt(head_dim)
        scores = jnp.where(seen[:, None, :, None], scores, -1e30).swapaxes(2, 3)
        now = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, fade = jnp.exp(scores - now), jnp.exp(top - now)
        total = total * fade + weights.sum(-1, keepdims=True)
        taken = jnp.einsum("WKGB,WKBH->WKGH", weights.astype(v.dtype), v, **_F32)
        return now, total, out * fade + taken

    empty = jnp.zeros((*q.shape[:3], 1), jnp.float32)
    carry = (empty - 1e30, empty, jnp.zeros(q.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(*blocks, add, carry)
    return (out / total).astype(q.dtype).reshape(slots, 1, -1, head_dim)


def _blocks_of(position, live, window) -> tuple[Array, Array]:
    """The blocks that a row being decoded looks at: [first, end)."""
    end = jnp.max(jnp.where(live, position, 0)) // BLOCK + 1
    if window is None:
        return jnp.int32(0), end
    oldest = jnp.min(jnp.where(live, position, 2**30)) - window + 1
    return jnp.maximum(oldest, 0) // BLOCK, end


def _write(table: Array, new: Array, position: Array) -> Array:
    """new [W, *T, K, H] into table [W, X, K, B, H], at each slot's own [W, *T]."""

    def put(table, new, p):
        return table.at[p // BLOCK, :, p % BLOCK].set(new, mode="drop")

    return jax.vmap(put)(table, new.astype(table.dtype), position)


def _layers(model: Decoder, params: Params) -> list[Params]:
    """A layer's weights, taken apart once; indexing in the loop would copy them."""
    return [
        jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(model.config.layers)
    ]


def decode(
    model: Decoder,
    params: Params,
    state: State,
    refill: Callable[[State], State],
    rows: Array,
    *,
    key: Array,
    sampling: Sampling,
    ends: Ends,
    widths: Sequence[int],
) -> State:
    """Turns until the queue is empty and every row has ended.

    When the queue is empty and few slots have a row left, narrower loops go on with
    those: the last rows do not pay for slots that stand idle.
    """
    layers, window = _layers(model, params), model.config.sliding_window
    none = state.out.tokens.shape[0]

    def step(state: State) -> State:
        if len(state.row) == widths[0]:  # afterwards the queue is empty
            state = refill(state)
        cache, live = state.cache, state.row < none
        blocks = _blocks_of(cache.position, live, window)
        x, new = model.embed(params, cache.token[:, None]), []
        for layer, (keys, values) in zip(layers, cache.layers, strict=True):

            def attend(q, k, v, keys=keys, values=values):
                keys = _write(keys, k[:, 0], cache.position)
                values = _write(values, v[:, 0], cache.position)
                out = _attend(q, keys, values, cache.position, window, blocks)
                return out, (keys, values)

            x, both = model.block(layer, x, cache.position[:, None], attend)
            new.append(both)
        hidden = model.finish(params, x)[:, 0]
        logits = few_rows(model.unembed(params).T, hidden, **_F32)

        out, row = state.out, state.row
        at = out.lengths.at[row].get(mode="fill", fill_value=0)
        row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(row)
        token, logp = sampling(logits, row_keys, at)
        token = jnp.where(live, token, cache.token)
        recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], 1)
        ended = ends.reached(recent)

        def put(table, value):
            return table.at[row, at].set(value, mode="drop")

        out = dataclasses.replace(
            out,
            tokens=put(out.tokens, token),
            logps=put(out.logps, logp),
            mask=put(out.mask, True),
            lengths=out.lengths.at[row].add(1, mode="drop"),
            finished=out.finished.at[row].set(ended, mode="drop"),
        )
        return State(
            offered=state.offered + live.size,
            used=state.used + live.sum(),
            queue=state.queue,
            row=jnp.where(ended | (at + 1 >= ends.limit), none, row),
            recent=recent,
            cache=Cache(token, cache.position + live, tuple(new)),
            out=out,
        )

    for width, least in zip(widths, (*widths[1:], 0), strict=True):
        state = _narrow(state, width)
        go_on = functools.partial(_more, rows=rows, least=least)
        state = jax.lax.while_loop(go_on, step, state)
    occupancy = state.used / jnp.maximum(state.offered, 1)
    out = dataclasses.replace(state.out, occupancy=occupancy.astype(jnp.float32))
    return dataclasses.replace(state, out=out)


def _more(state: State, rows: Array, least: int) -> Bool[Array, ""]:
    """Whether to go on with these slots: rows wait, or enough are being decoded."""
    live = (state.row < state.out.tokens.shape[0]).sum()
    return (live > least) | (state.queue < rows)


def _narrow(state: State, width: int) -> State:
    """The slots that decode a row, moved into `width` slots."""
    if width == len(state.row):
        return state
    order = jnp.argsort(state.row, stable=True)[:width]  # those without one are last
    cache = Cache(
        state.cache.token[order],
        state.cache.position[order],
        jax.tree.map(lambda x: x[order], state.cache.layers),
    )
    row, recent = state.row[order], state.recent[order]
    return dataclasses.replace(state, row=row, recent=recent, cache=cache)


def start(cache: Cache, row: Array, rows: int, ends: Ends) -> State:
    shape = (rows, ends.limit)
    longest = max([1, *map(len, ends.stop)])
    return State(
        offered=jnp.int32(0),
        used=jnp.int32(0),
        queue=jnp.int32(0),
        row=row,
        recent=jnp.full((len(row), longest), -1, jnp.int32),
        cache=cache,
        out=Rollouts(
            tokens=jnp.zeros(shape, jnp.int32),
            logps=jnp.zeros(shape, jnp.float32),
            mask=jnp.zeros(shape, bool),
            lengths=jnp.zeros(rows, jnp.int32),
            finished=jnp.zeros(rows, bool),
        ),
    )


def append(
    model: Decoder, params: Params, cache: Cache, tokens: Array, lengths: Array
) -> Cache:
    """tokens [W, T], of which [W] are real, after what the slots hold."""
    tokens = jnp.concatenate([cache.token[:, None], tokens], 1)
    token = jnp.take_along_axis(tokens, lengths[:, None], 1)[:, 0]
    step = jnp.arange(tokens.shape[1] - 1)[None]
    positions = cache.position[:, None] + step
    at = jnp.where(step < lengths[:, None], positions, 2**30)  # the others are dropped
    x, new = model.embed(params, tokens[:, :-1]), []
    for layer, tables in zip(_layers(model, params), cache.layers, strict=True):

        def attend(q, k, v, tables=tables):
            tables = _write(tables[0], k, at), _write(tables[1], v, at)
            # [W, X, K, B, H] -> [W, X B, K, H]
            keys, values = (
                x.transpose(0, 1, 3, 2, 4)
                .reshape(x.shape[0], -1, *x.shape[2::2])
                .astype(q.dtype)
                for x in tables
            )
            distance = positions[:, :, None] - jnp.arange(keys.shape[1])[None, None]
            allowed = distance >= 0
            if model.config.sliding_window is not None:
                allowed &= distance < model.config.sliding_window
            return attention(q, keys, values, allowed), tables

        x, tables = model.block(layer, x, positions, attend)
        new.append(tables)
    return Cache(token, cache.position + lengths, tuple(new))
