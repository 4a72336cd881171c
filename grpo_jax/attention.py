"""Attention over whole rows: who sees whom, and the fastest way the platform has.

In: queries, keys and values of rows of T positions, and `Rows`. Out: what each query
takes from the values it may see. `attend` chooses:

- XLA (CPU, and wherever no kernel fits): queries in chunks, one after the other, most
  of the later keys left out. The backward pass computes a chunk's scores again: memory
  grows with T, not T².
- TPU: splash attention, which skips blocks that nobody may look at.
- GPU: cuDNN's flash attention, for bfloat16 and float16.

Axes: B rows, T positions, S positions attended to, N query heads, K key heads, G query
heads per key head, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import sharding
from grpo_jax.packing import PROMPT

CHUNK = 64  # queries of a chunk on XLA
GROUPS = 8  # of chunks: each as far as its last chunk sees, (1 + 1 / 8) / 2 of the work
LANES = 128  # a TPU's: the least block
BLOCK = 512  # positions of a block on TPU
_F32: Any = dict(preferred_element_type=jnp.float32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["real", "segments", "positions"],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """What decides who sees whom.

    >>> rows = Rows(jnp.ones((1, 3), bool), jnp.array([[1, 2, 2]]), jnp.arange(3)[None])
    >>> rows.allowed().astype(int).tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]
    """

    real: Array  # bool [B, T]: not padding
    segments: Array | None  # int32 [B, T], as `packing.pack` numbers them; None: one
    positions: Array  # int32 [B, T]
    window: int | None = None  # a query sees positions less than this before its own

    def allowed(
        self, start: Any = 0, count: int | None = None, stop: int | None = None
    ) -> Bool[Array, "B t s"]:
        """Whether `count` queries from `start` on see the keys before `stop`.

        They see what is earlier, real, of the same sequence and in the window, and
        themselves: even padding sees something, so that every softmax is of a number.
        """
        count = self.real.shape[1] if count is None else count

        def pairs(x: Array) -> tuple[Array, Array]:
            mine = jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)
            return mine[:, :, None], x[:, None, :stop]

        mine, theirs = pairs(jnp.arange(self.real.shape[1])[None])
        allowed = (mine > theirs) & self.real[:, None, :stop]
        if self.segments is not None:
            of = pairs(self.segments)
            allowed &= (of[0] == of[1]) | shares_prompt(*of)
        if self.window is not None:
            at = pairs(self.positions)
            allowed &= at[0] - at[1] < self.window
        return allowed | (mine == theirs)


def shares_prompt(mine: Int[Array, "..."], theirs: Int[Array, "..."]) -> Array:
    """Whether a key's segment is the prompt that a query's segment goes on from.

    Prompt g, shared by several outputs, is segment g·2^16; what goes on from it is
    g·2^16 + 1 and above (`packing.pack` with share_prompts). Plain segments are below
    2^16, and segment 0 is padding.
    """
    is_prompt = (theirs % PROMPT == 0) & (theirs > 0)
    return is_prompt & (mine // PROMPT == theirs // PROMPT)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    allowed: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k / √H) v over the allowed positions, in float32 inside."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed[:, None, None], scores / math.sqrt(q.shape[-1]), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: Rows,
) -> Float[Array, "B T N H"]:
    """`attention(q, k, v, rows.allowed())`, by the platform's way of computing it."""
    where = platform()
    if where == "tpu" and q.shape[1] >= LANES:
        return on_each_device(splash, q, k, v, rows)
    if where == "gpu" and cudnn_takes(q):
        return on_each_device(cudnn, q, k, v, rows)
    return chunked(q, k, v, rows)


def platform() -> str:
    """Whose kernels may be used: "gpu", "tpu", or else "cpu", which has none.

    The mesh in use knows, also where the machine that compiles has no such devices.
    `jax.lax.platform_dependent` would trace every way on every platform, and cuDNN's
    refuses to be traced without cuDNN; under `grad` it keeps what each would need.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    if devices > 1 and sharding.mesh_in_use() is None:
        return "cpu"  # who knows how arrays are spread? XLA can split what is its own
    device = mesh.abstract_device
    return device.platform if device else jax.default_backend()


def chunked(
    q: Array, k: Array, v: Array, rows: Rows, size: int = CHUNK
) -> Float[Array, "B T N H"]:
    """At most `size` queries at a time; their scores are not kept for gradients."""
    length, heads = q.shape[1], q.shape[2]
    chunks = -(-length // size)
    if chunks == 1:
        return attention(q, k, v, rows.allowed())
    size = -(-length // chunks)
    q, k, v, rows = lengthen((q, k, v, rows), chunks * size - length)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    out = _chunked(q, k.swapaxes(1, 2), v.swapaxes(1, 2), rows, size)
    out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], heads, -1)[:, :length]


def _groups(rows: Rows, size: int) -> list[tuple[Array, int]]:
    """The chunks' starts and how many keys they look at, group by group.

    Chunks of one group have the same keys and follow one another in a loop: side by
    side XLA would compute them all at once, in the memory of all.
    """
    chunks = rows.real.shape[1] // size
    ends = [chunks * i // GROUPS for i in range(GROUPS + 1)]
    spans = zip(ends, ends[1:], strict=False)
    return [(size * jnp.arange(a, b), b * size) for a, b in spans if a < b]


def _scores(q: Array, k: Array, rows: Rows, start: Array, size: int) -> Array:
    """[B, K, G, t, s] of a chunk and these keys; -1e30 where they may not look."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", _at(q, start, size), k, **_F32)
    allowed = rows.allowed(start, size, k.shape[2])[:, None, None]
    return jnp.where(allowed, scores / math.sqrt(q.shape[-1]), -1e30)


def _at(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(q, k, v, rows, size):
    return _forward(q, k, v, rows, size)[0]


def _forward(q, k, v, rows, size):
    def chunk(stop, start):
        scores = _scores(q, k[:, :, :stop], rows, start, size)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        values = v[:, :, :stop]
        out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), values, **_F32)
        return (out / total).astype(q.dtype), top + jnp.log(total)

    found = []
    for starts, stop in _groups(rows, size):
        found.append(jax.lax.map(functools.partial(chunk, stop), starts))
    out, log_total = (
        jnp.moveaxis(jnp.concatenate(x), 0, 3).reshape(*q.shape[:-1], -1)
        for x in zip(*found, strict=True)
    )
    return out, (q, k, v, rows, out, log_total)


def _backward(size, saved, d_out):
    q, k, v, rows, out, log_total = saved
    # Σ_s π_s ∂L/∂π_s = ∂L/∂o · o
    inner = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)

    def chunk(keys, values, carry, start):
        scores = _scores(q, keys, rows, start, size)
        weights = jnp.exp(scores - _at(log_total, start, size))
        d_here = _at(d_out, start, size)
        d_weights = jnp.einsum("BKGTH,BKSH->BKGTS", d_here, values, **_F32)
        d_scores = weights * (d_weights - _at(inner, start, size))
        d_scores = (d_scores / math.sqrt(q.shape[-1])).astype(q.dtype)
        here = _at(q, start, size)
        d_k = jnp.einsum("BKGTS,BKGTH->BKSH", d_scores, here, **_F32)
        weights = weights.astype(v.dtype)
        d_v = jnp.einsum("BKGTS,BKGTH->BKSH", weights, d_here, **_F32)
        d_q = jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, keys, **_F32)
        return (carry[0] + d_k, carry[1] + d_v), d_q.astype(q.dtype)

    d_k = d_v = jnp.zeros(k.shape, jnp.float32)
    found = []
    for starts, stop in _groups(rows, size):
        keys, values = k[:, :, :stop], v[:, :, :stop]
        carry = d_k[:, :, :stop], d_v[:, :, :stop]
        step = functools.partial(chunk, keys, values)
        carry, d_q = jax.lax.scan(step, carry, starts)
        d_k, d_v = (
            jax.lax.dynamic_update_slice_in_dim(x, y, 0, 2)
            for x, y in zip((d_k, d_v), carry, strict=True)
        )
        found.append(d_q)
    d_q = jnp.moveaxis(jnp.concatenate(found), 0, 3).reshape(q.shape)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_chunked.defvjp(_forward, _backward)


def lengthen(tree: Any, missing: int) -> Any:
    """Every [B, T, …] with `missing` more positions, not real and of segment 0."""
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)), tree
    )


def splash(
    q: Array, k: Array, v: Array, rows: Rows, interpret: bool = False
) -> Float[Array, "B T N H"]:
    """JAX's Pallas kernel for TPUs, row after row, with each row's own mask.

    Shared prompts are no equality of segments, so the mask is an array and not the
    kernel's segment ids; 4 bytes a pair of positions, which no head has for itself.
    In turn blocks of other segments cost nothing.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )

    length = q.shape[1]
    block = min(BLOCK, -(-length // LANES) * LANES)
    # The kernel does not scale.
    q = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    q, k, v, rows = lengthen((q, k, v, rows), -length % block)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, heads, T, H]
    names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}

    def row(q, k, v, allowed) -> Any:
        kernel = kernels.make_splash_mha_single_device(
            allowed[None],  # one mask for all heads
            block_sizes=kernels.BlockSizes(**sizes),
            interpret=interpret,
        )
        # What the kernel asks of this flag needs a bool; under jit it is an array.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(q, k, v)

    out = jax.vmap(row)(q, k, v, rows.allowed())
    return out.swapaxes(1, 2)[:, :length]


def cudnn_takes(q: Array) -> bool:
    """Whether cuDNN's flash attention computes this on every GPU since Ampere."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and q.shape[1] % 2 == 0


def cudnn(
    q: Array, k: Array, v: Array, rows: Rows, implementation: Any = "cudnn"
) -> Float[Array, "B T N H"]:
    """cuDNN's flash attention; the mask goes in as a bias, 2 bytes a pair."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=rows.allowed()[:, None],
        is_causal=True,  # blocks above the diagonal are skipped
        implementation=implementation,
    )


def on_each_device(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, rows: Rows
) -> Float[Array, "B T N H"]:
    """The kernel on each device's rows and heads: XLA cannot split what is in it."""
    mesh = sharding.mesh_in_use()
    if mesh is None:
        return kernel(q, k, v, rows)
    batch = None if q.shape[0] % sharding.rows_multiple(mesh) else sharding.BATCH[0]
    heads = None if k.shape[2] % mesh.shape["tensor"] else "tensor"
    whole = sharding.P(batch, None, heads)
    return jax.shard_map(
        kernel,
        in_specs=(whole, whole, whole, sharding.P(batch)),
        out_specs=whole,
        check_vma=False,  # kernels do not say how their outputs vary over the mesh
    )(q, k, v, rows)
