"""Kernels of a decode step: products for one position per row, and cache attention.

In float32 on one CPU both are C++ (`cpu/`). Elsewhere XLA computes the product, and the
caller computes attention to its cache.

Axes: B rows, D and F width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from grpo_jax.models.kernels import cpu


@dataclasses.dataclass(frozen=True)
class DecodeKernels:
    """The functions that a decode step calls.

    product: (weight [F, D], x [B, D]) → x weightᵀ [B, F].
    attention: writes the step's keys and values and attends to the cache, as
      `cpu.attend` does; None: there is no kernel for it.
    """

    product: Callable[..., Array]
    attention: Callable[..., Any] | None


def decode_kernels(dtype: str, *caches: Any) -> DecodeKernels:
    """Returns the kernels for a decode step.

    Args:
      dtype: of the computation, "float32" or "bfloat16".
      caches: the cached keys and values, in any tree.
    """
    if dtype == "float32" and cpu.fit(*caches):
        return DecodeKernels(cpu.few_rows, cpu.attend)
    return DecodeKernels(few_rows_product, None)


def few_rows_product(
    weight: Float[Array, "F D"], x: Float[Array, "B D"], **options: Any
) -> Float[Array, "B F"]:
    """Returns x weightᵀ, with the weight as the first factor.

    CPUs repack the second factor. With few rows, it is a fifth faster if that is x.
    """
    return jax.lax.dot_general(weight, x, (((1,), (1,)), ((), ())), **options).T
