"""A decode turn: products of one position a row, and attention to the cache.

On one CPU in float32 both are C++ (`cpu/`). Elsewhere the product is XLA's, and the
caller attends to its cache by XLA.

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
    """The functions that a decode turn calls.

    product: (weight [F, D], x [B, D]) → x weightᵀ [B, F].
    attention: writes a turn's keys and values and attends to the cache, as
      `cpu.attend`; None: there is no kernel for it.
    """

    product: Callable[..., Array]
    attention: Callable[..., Any] | None


def decode_kernels(dtype: str, *caches: Any) -> DecodeKernels:
    """Returns the kernels for a computation in `dtype` with these cached arrays."""
    if dtype == "float32" and cpu.fit(*caches):
        return DecodeKernels(cpu.few_rows, cpu.attend)
    return DecodeKernels(few_rows_product, None)


def few_rows_product(
    weight: Float[Array, "F D"], x: Float[Array, "B D"], **options: Any
) -> Float[Array, "B F"]:
    """Returns x weightᵀ, with the weight as the first factor.

    For few rows CPUs are a fifth faster this way round: they repack the second factor.
    """
    return jax.lax.dot_general(weight, x, (((1,), (1,)), ((), ())), **options).T
