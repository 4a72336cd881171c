"""Attention over packed rows on a TPU: splash attention, JAX's Pallas kernel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.kernels.mask import AttentionMask, pad_positions

LANES = 128  # a TPU's: the least block
TPU_BLOCK = 512  # positions of a block


def takes(q: Array) -> bool:
    """Returns whether splash attention computes this: rows of a block or more."""
    return q.shape[1] >= LANES


def splash(
    q: Array, k: Array, v: Array, rows: AttentionMask, interpret: bool = False
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
    q, k, v, rows = pad_positions((q, k, v, rows), -length % block)
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
