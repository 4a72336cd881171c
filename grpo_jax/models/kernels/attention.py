"""Attention over whole rows: who sees whom, and the fastest way the platform has.

In: queries, keys and values of rows of T positions, and `Rows`. Out: what each query
takes from the values it may see. `attend` chooses:

- CPU, and wherever no kernel fits: the pairs of blocks that see each other
  (`block_attention.py`), by XLA or `cpu_kernels`; time and memory do not grow with T².
- TPU: splash attention, which skips blocks that nobody may look at.
- GPU: cuDNN's flash attention, for bfloat16 and float16.

Axes: B rows, T positions, S positions attended to, N query heads, K key heads, G query
heads per key head, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.distributed import sharding
from grpo_jax.models.kernels.block_attention import BLOCK, block_attention
from grpo_jax.training.packing import PROMPT
from grpo_jax.models.kernels.products import einsum
from grpo_jax.distributed.sharding import platform

log = logging.getLogger(__name__)
LANES = 128  # a TPU's: the least block
TPU_BLOCK = 512  # positions of a block on TPU


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


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    allowed: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k / √H) v over the allowed positions, in float32 inside.

    What is not finite in a key or value changes nothing for queries that may not look
    at it, nor for the gradients that they have part in.
    """
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    bad_q, bad_k = (
        ~jnp.isfinite(q).all(-1),
        ~(jnp.isfinite(k) & jnp.isfinite(v)).all(-1),
    )
    bad = jnp.moveaxis(bad_q, 1, -1)[..., None]  # [B, K, G, T, 1]
    bad = bad | bad_k.swapaxes(1, 2)[:, :, None, None]
    k, v = (jnp.where(bad_k[..., None], 0, x) for x in (k, v))
    scores = einsum("BTKGH,BSKH->BKGTS", jnp.where(bad_q[..., None], 0, q), k)
    scores = jnp.where(bad, jnp.nan, scores / math.sqrt(q.shape[-1]))
    allowed = allowed[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
    weights = jnp.where(allowed, weights, 0).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)
    out = out.reshape(*out.shape[:2], -1, out.shape[-1])
    lost = jnp.isnan(out).any((2, 3), keepdims=True)  # the loss's gradient is NaN there
    return jnp.where(lost, jax.lax.stop_gradient(out), out)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: Rows,
) -> Float[Array, "B T N H"]:
    """`attention(q, k, v, rows.allowed())`, by the platform's way of computing it."""
    kernel, where = in_blocks, platform()
    if where == "tpu" and q.shape[1] >= LANES:
        kernel = splash
    if where == "gpu" and cudnn_takes(q):
        kernel = cudnn
    if kernel is not in_blocks and not sharding.layout_is_known():
        say_no_kernel(where, jax.device_count())
        kernel = in_blocks
    return on_each_device(kernel, q, k, v, rows)


@functools.cache
def say_no_kernel(where: str, devices: int) -> None:
    """Warns once that attention is slow, and how to make it fast."""
    log.warning(
        "attention: %d %s devices and no mesh, so its fast kernel is not used; run "
        "under jax.set_mesh(grpo_jax.distributed.sharding.make_mesh(devices=…))",
        devices,
        where.upper(),
    )


def in_blocks(
    q: Array, k: Array, v: Array, rows: Rows, size: int = BLOCK
) -> Float[Array, "B T N H"]:
    """Blocks of `size` that see each other; at once where there is only one block."""
    length = q.shape[1]
    if length <= size:
        return attention(q, k, v, rows.allowed())
    q, k, v, rows = lengthen((q, k, v, rows), -length % size)
    return block_attention(q, k, v, rows, size)[:, :length]


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
    block = min(TPU_BLOCK, -(-length // LANES) * LANES)
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
    """The kernel on each device's rows and heads: XLA cannot split what is in it.

    Inside a shard_map the axes that it leaves are mapped over even if their size is 1:
    a kernel for TPUs is refused as long as any axis is XLA's to split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = set(sharding.AXES) <= set(mesh.axis_names)
    one_device = mesh.size == 1 and not mesh.manual_axes
    if not ours or one_device or not sharding.free(mesh):
        return kernel(q, k, v, rows)
    batch = None if q.shape[0] % sharding.rows_multiple(mesh) else sharding.BATCH[0]
    heads = None if k.shape[2] % sharding.size_of(mesh, "tensor") else "tensor"
    whole = sharding.within(sharding.P(batch, None, heads), mesh)
    return jax.shard_map(
        kernel,
        in_specs=(whole, whole, whole, sharding.P(*whole[:1])),
        out_specs=whole,
        axis_names=sharding.free(mesh),
        check_vma=False,  # kernels do not say how their outputs vary over the mesh
    )(q, k, v, rows)
