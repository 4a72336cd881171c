"""Attention over packed rows on a GPU: cuDNN's flash attention, in half precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.kernels.mask import AttentionMask


def supports(q: Array) -> bool:
    """Returns whether cuDNN supports queries [B, T, N, H] on every GPU since Ampere."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and q.shape[1] % 2 == 0


def cudnn_attention(
    q: Array, k: Array, v: Array, rows: AttentionMask, implementation: Any = "cudnn"
) -> Float[Array, "B T N H"]:
    """Computes attention by cuDNN; arguments and result are as in `attention.attend`.

    cuDNN takes the mask as a bias, which costs 2 bytes per pair of positions.

    Args:
      implementation: as in `jax.nn.dot_product_attention`; tests use "xla".
    """
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=rows.allowed()[:, None],
        is_causal=True,  # blocks above the diagonal are skipped
        implementation=implementation,
    )
