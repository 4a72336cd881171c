"""Attention over packed rows by XLA, for platforms and shapes without another kernel.

Short rows are computed in one piece (`dense_attention`). For longer rows, the pairs
(block of queries, block of keys) in which any token may attend are listed first. One
loop then visits them in turn, with a running softmax. Time grows with the number of
pairs, not with T², and memory grows with T. The backward pass visits the same pairs and
recomputes their scores. In float32 on one CPU, both loops are C++ (`cpu/`).

Axes: B rows, T positions, S positions attended to, X blocks of a row, t and s positions
of a block of queries and of keys, N query heads, K key heads, G query heads per key
head, M = G·t, H head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from grpo_jax.models.kernels import cpu
from grpo_jax.models.kernels.mask import (
    AttentionMask,
    Pairs,
    pad_positions,
    visible_block_pairs,
)
from grpo_jax.models.kernels.products import einsum

BLOCK = 64  # t and s


def block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: AttentionMask,
    size: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k / √H) v over the allowed positions, block by block.

    Supports first-order reverse-mode differentiation only.

    Args:
      q, k, v, rows: as in `attention.attend`.
      size: positions of a block; divides T.
    """
    batch, length, heads, width = q.shape
    blocks, kv_heads = length // size, k.shape[2]
    q = q.reshape(batch, blocks, size, kv_heads, -1, width)
    q = q.transpose(0, 1, 3, 4, 2, 5).reshape(batch * blocks, kv_heads, -1, width)
    k, v = (
        x.reshape(batch * blocks, size, kv_heads, width).swapaxes(1, 2) for x in (k, v)
    )
    out = _attend(q, k, v, rows, visible_block_pairs(rows, size), size)
    out = out.reshape(batch, blocks, kv_heads, -1, size, width)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(batch, length, heads, width)


def mark_nonfinite(k: Array, v: Array) -> tuple[Array, Array]:
    """Returns keys and values in which NaN cannot pass the mask.

    A weight of 0 times NaN is NaN, so a masked value could still spoil the output.
    Where a value is not finite, it becomes 0 and its key NaN. The mask replaces NaN
    scores, so only queries that may attend to the key get NaN.

    Args:
      k, v: keys and values, [..., H].
    """
    good = jnp.isfinite(v)  # one NaN in a key makes all its scores NaN
    return jnp.where(good, k, jnp.nan), jnp.where(good, v, 0)


def _clean(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _take(x: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: Array, value: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)


def _add(x: Array, value: Array, index: Array) -> Array:
    return _put(x, _take(x, index) + value, index)


def _scores(q: Array, k: Array, rows: AttentionMask, pairs: Pairs, n: Array, size: int):
    """Returns the scores of pair n and its mask, [K, M, s], and its blocks' numbers.

    Masked scores are -1e30.
    """
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
    k, v = mark_nonfinite(k, v)
    if cpu.kernels_fit(q, k, v):
        found = cpu.blocks_forward(q, k, v, rows, pairs)
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
    # Remat policies keep these names, so the loop does not run a second time.
    out = checkpoint_name((out / total).astype(q.dtype), "attention")
    log_total = checkpoint_name(top + jnp.log(total), "attention")
    return out, (*given, rows, pairs, out, log_total)


def _backward(size, saved, d_out):
    q, k, v, rows, pairs, out, log_total = saved
    # Σ_s π_s ∂L/∂π_s = ∂L/∂o · o
    inner = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    # A query that got NaN has a log_total of NaN, which gives NaN gradients to all keys
    # that it may attend to. Other sums must not become NaN through a weight of 0, so
    # the arrays themselves are cleaned.
    q, k, v, d_out = map(_clean, (q, k, v, d_out))
    if cpu.kernels_fit(q, k, v, d_out):
        given = (q, k, v, rows, pairs, log_total, d_out, inner)
        found = cpu.blocks_backward(*given)
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


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    allowed: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k / √H) v over the allowed positions.

    Scores and softmax are float32. A key or value that is not finite does not affect
    queries that may not attend to it, nor their gradients.

    Args:
      q: queries, [B, T, N, H].
      k, v: keys and values, [B, S, K, H]; K divides N.
      allowed: True where a query may attend to a key.
    """
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    # Computed with 0 in place of what is not finite. The queries that it reaches get
    # NaN at the end, and pass no gradient.
    lost = ~jnp.isfinite(q).all((2, 3, 4), keepdims=True)
    bad = ~(jnp.isfinite(k) & jnp.isfinite(v)).all((2, 3), keepdims=True)
    lost |= (allowed & bad[:, None, :, 0, 0]).any(-1)[..., None, None, None]
    q, k, v = map(_clean, (q, k, v))
    scores = einsum("BTKGH,BSKH->BKGTS", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(allowed[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.where(lost, jnp.nan, jnp.einsum("BKGTS,BSKH->BTKGH", weights, v))
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def padded_block_attention(
    q: Array, k: Array, v: Array, rows: AttentionMask, size: int = BLOCK
) -> Float[Array, "B T N H"]:
    """Returns attention over rows of any length; they are padded to whole blocks.

    Rows of at most one block use `dense_attention`.

    Args:
      q, k, v, rows: as in `attention.attend`.
      size: positions of a block.
    """
    length = q.shape[1]
    if length <= size:
        return dense_attention(q, k, v, rows.allowed())
    q, k, v, rows = pad_positions((q, k, v, rows), -length % size)
    return block_attention(q, k, v, rows, size)[:, :length]
