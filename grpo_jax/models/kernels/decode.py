"""Kernels of a decode step: products for one position per row, and cache attention.

In float32 on one CPU both are C++ (`cpu/`). Elsewhere XLA computes the product, and the
caller computes attention to its cache.

Axes: B rows, D and F width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from grpo_jax.models.kernels import cpu
from grpo_jax.models.kernels.products import einsum


def decode_kernels(
    dtype: str, *caches: Any
) -> tuple[Callable[[Array, Array], Array], Callable[..., Any] | None]:
    """Returns the functions that a decode step calls, (product, attention).

    Args:
      dtype: of the computation, "float32" or "bfloat16".
      caches: the cached keys and values, in any tree.

    Returns:
      The product is `few_rows_product` or its kernel. The attention writes the step's
      keys and values and attends to the cache, as `cpu.attend` does; None if there is
      no kernel for it.
    """
    if dtype == "float32" and cpu.kernels_fit(*caches):
        return cpu.few_rows, cpu.attend
    return few_rows_product, None


def few_rows_product(
    x: Float[Array, "B D"], weight: Float[Array, "F D"]
) -> Float[Array, "B F"]:
    """Returns x weightᵀ in float32, multiplied with the weight as the first factor.

    CPUs repack the second factor. With few rows, it is a fifth faster if that is x.
    """
    return einsum("FD,BD->FB", weight, x).T
