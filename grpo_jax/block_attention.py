"""Attention where the platform has no kernel: only blocks that see each other.

In: queries, keys and values of rows of T positions, and `Rows`. Out: what each query
takes. The pairs (block of queries, block of keys) in which anybody may look at anything
are listed first; one loop then takes them in turn, with a running softmax. Work and
time grow with the pairs that there are, not with T²; memory grows with T. The backward
pass walks over the same pairs and computes their scores again. On a CPU the two loops
are `cpu_kernels`', where those fit.

Axes: B rows, T positions, X blocks of a row, t and s positions of a block of queries
and of keys, K key heads, G query heads per key head, M = G·t, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo_jax import cpu_kernels
from grpo_jax.products import einsum

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from grpo_jax.attention import Rows

BLOCK = 64  # t and s


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


def pairs_of(rows: Rows, size: int) -> Pairs:
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


def block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: Rows,
    size: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """softmax(q k / √H) v over what `rows` allows; T is a multiple of `size`."""
    batch, length, heads, width = q.shape
    blocks, kv_heads = length // size, k.shape[2]
    q = q.reshape(batch, blocks, size, kv_heads, -1, width)
    q = q.transpose(0, 1, 3, 4, 2, 5).reshape(batch * blocks, kv_heads, -1, width)
    k, v = (
        x.reshape(batch * blocks, size, kv_heads, width).swapaxes(1, 2) for x in (k, v)
    )
    out = _attend(q, k, v, rows, pairs_of(rows, size), size)
    out = out.reshape(batch, blocks, kv_heads, -1, size, width)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(batch, length, heads, width)


def marked(k: Array, v: Array) -> tuple[Array, Array]:
    """The same keys and values, so that no mask lets a number through that it hides.

    The product of a weight of 0 and a NaN is NaN. So where a value is not finite it
    becomes 0, and its key NaN, whose scores the mask replaces: queries that may look at
    it still take NaN, and no others do. [..., H] each.
    """
    good = jnp.isfinite(v)  # of each number: a key of which one is NaN has such scores
    return jnp.where(good, k, jnp.nan), jnp.where(good, v, 0)


def _clean(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _take(x: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: Array, value: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)


def _add(x: Array, value: Array, index: Array) -> Array:
    return _put(x, _take(x, index) + value, index)


def _scores(q: Array, k: Array, rows: Rows, pairs: Pairs, n: Array, size: int):
    """Scores [K, M, s] of pair n, -1e30 where nobody may look, and where somebody may;
    the blocks' numbers."""
    blocks = rows.real.shape[1] // size
    row, i, j = pairs.row[n], pairs.queries[n], pairs.keys[n]
    mine, theirs = row * blocks + i, row * blocks + j
    here = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, row), rows)
    allowed = here.allowed(i * size, size, j * size, size)[0]  # [t, s]
    scores = einsum("KMH,KsH->KMs", _take(q, mine), _take(k, theirs))
    scores = scores.reshape(scores.shape[0], -1, size, size) / math.sqrt(q.shape[-1])
    shape = (scores.shape[0], -1, size)
    allowed = jnp.broadcast_to(allowed, scores.shape).reshape(shape)
    return jnp.where(allowed, scores.reshape(shape), -1e30), allowed, mine, theirs


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, rows, pairs, size):
    return _forward(q, k, v, rows, pairs, size)[0]


def _forward(q, k, v, rows, pairs, size):
    given = (q, k, v)
    k, v = marked(k, v)
    if cpu_kernels.fit(q, k, v):
        found = cpu_kernels.blocks_forward(q, k, v, rows, pairs)
        out, log_total = (checkpoint_name(x, "attention") for x in found)
        return out, (*given, rows, pairs, out, log_total)

    def step(n, carry):
        scores, _, mine, theirs = _scores(q, k, rows, pairs, n, size)
        top, total, out = (_take(x, mine) for x in carry)
        now = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, fade = jnp.exp(scores - now), jnp.exp(top - now)
        more = einsum("KMs,KsH->KMH", weights.astype(v.dtype), _take(v, theirs))
        new = (
            now,
            total * fade + weights.sum(-1, keepdims=True),
            out * fade + more,
        )
        return tuple(_put(x, y, mine) for x, y in zip(carry, new, strict=True))

    zero = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    start = (zero - 1e30, zero, jnp.zeros(q.shape, jnp.float32))
    with jax.named_scope("pairs"):
        top, total, out = jax.lax.fori_loop(0, pairs.count, step, start)
    # Under `remat` these are kept: the loop is not walked a second time.
    out = checkpoint_name((out / total).astype(q.dtype), "attention")
    log_total = checkpoint_name(top + jnp.log(total), "attention")
    return out, (*given, rows, pairs, out, log_total)


def _backward(size, saved, d_out):
    q, k, v, rows, pairs, out, log_total = saved
    # Σ_s π_s ∂L/∂π_s = ∂L/∂o · o
    inner = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    # A query that took NaN has a log_total of NaN, and so has the gradient of all that
    # it may look at; what others have in common with it are sums with weights of 0.
    q, k, v, d_out = map(_clean, (q, k, v, d_out))
    if cpu_kernels.fit(q, k, v, d_out):
        given = (q, k, v, rows, pairs, log_total, d_out, inner)
        found = cpu_kernels.blocks_backward(*given)
        return *found, None, None

    def step(n, carry):
        d_q, d_k, d_v = carry
        scores, allowed, mine, theirs = _scores(q, k, rows, pairs, n, size)
        weights = jnp.exp(scores - _take(log_total, mine))
        weights = jnp.where(allowed, weights, 0)
        here = _take(d_out, mine)
        d_weights = einsum("KMH,KsH->KMs", here, _take(v, theirs))
        d_scores = weights * (d_weights - _take(inner, mine))
        d_scores = jnp.where(allowed, d_scores, 0)
        d_scores = (d_scores / math.sqrt(q.shape[-1])).astype(q.dtype)
        d_v_here = einsum("KMs,KMH->KsH", weights.astype(v.dtype), here)
        d_k_here = einsum("KMs,KMH->KsH", d_scores, _take(q, mine))
        d_q_here = einsum("KMs,KsH->KMH", d_scores, _take(k, theirs))
        return (
            _add(d_q, d_q_here, mine),
            _add(d_k, d_k_here, theirs),
            _add(d_v, d_v_here, theirs),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    with jax.named_scope("pairs"):
        found = jax.lax.fori_loop(0, pairs.count, step, start)
    d_q, d_k, d_v = (x.astype(y.dtype) for x, y in zip(found, (q, k, v), strict=True))
    return d_q, d_k, d_v, None, None


_attend.defvjp(_forward, _backward)
