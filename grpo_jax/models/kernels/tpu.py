"""Attention over packed rows on a TPU: splash attention, JAX's Pallas kernel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.kernels.mask import AttentionMask, pad_positions

LANES = 128  # lanes of a TPU register; the smallest block
TPU_BLOCK = 512  # positions of a block


def supports(q: Array) -> bool:
    """Returns whether queries [B, T, N, H] are long enough for splash attention."""
    return q.shape[1] >= LANES


def splash_attention(
    q: Array, k: Array, v: Array, rows: AttentionMask, interpret: bool = False
) -> Float[Array, "B T N H"]:
    """Computes attention by splash attention; arguments are as in `attention.attend`.

    Each row has its own mask. It is passed as an array, since the kernel's segment ids
    cannot express shared prompts. That costs 4 bytes per pair of positions, once for
    all heads. In return, the kernel skips blocks of other segments.

    Args:
      interpret: runs the kernel in Pallas's interpreter, for tests without a TPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )

    length = q.shape[1]
    block = min(TPU_BLOCK, -(-length // LANES) * LANES)
    # The kernel does not scale the scores.
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
        # The kernel tests this flag as a Python bool, but under jit it is an array.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(q, k, v)

    out = jax.vmap(row)(q, k, v, rows.allowed())
    return out.swapaxes(1, 2)[:, :length]
