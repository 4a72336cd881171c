"""Matrix products with float32 sums, by XLA or the C++ kernel.

XLA computes the products, except large ones in float32 on a CPU with bfloat16 tiles
(AMX). There the C++ kernel (`cpu/`) sums six products of bfloat16 parts, about twice as
fast. For numbers between 1e-33 and 3.39e38 its error is that of float32 sums in another
order: 0.5 to 1.3 times XLA's for sums of up to 1536 terms, and up to 2.4 times for sums
of 4096 terms of one sign or of a wide range of magnitudes.

Axes: M rows, D and F width, N columns, K the axis that is summed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from grpo_jax.distributed import sharding
from grpo_jax.models.kernels import cpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_LEAST = 128  # of every axis: smaller matrices are not worth splitting into parts
KEPT = "product"  # the name by which `jax.checkpoint` keeps the kernel's products


def linear(x: Float[Array, "M D"], weight: Float[Array, "F D"]) -> Float[Array, "M F"]:
    """Returns x weightᵀ.

    With AMX tiles, as with block attention, only first-order reverse-mode
    differentiation is supported.

    >>> linear(jnp.ones((2, 3)), jnp.ones((5, 3))).shape
    (2, 5)
    """
    if _by_tiles(x, weight, len(x), len(weight), x.shape[1]):
        return _linear(x, weight)
    return jnp.einsum("MD,FD->MF", x, weight)


def product(
    a: Array, b: Array, *, a_along: bool = True, b_along: bool = True
) -> Float[Array, "M N"]:
    """Returns Σ_k a b in float32, for code that defines its own gradient.

    Args:
      a: [M, K] if `a_along`, else [K, M].
      b: [N, K] if `b_along`, else [K, N].
      a_along, b_along: whether the factor's last axis is summed over, not its first.

    >>> product(jnp.ones((4, 2)), jnp.ones((4, 3)), a_along=False, b_along=False)[0, 0]
    Array(4., dtype=float32)
    """
    (m, k), n = a.shape[:: 1 if a_along else -1], b.shape[0 if b_along else 1]
    if _by_tiles(a, b, m, n, k):
        return cpu.product(a, b, a_along, b_along)
    axes = f"{'MK' if a_along else 'KM'},{'NK' if b_along else 'KN'}->MN"
    return einsum(axes, a, b)


def einsum(axes: str, a: Array, b: Array) -> Array:
    """Returns `jnp.einsum(axes, a, b)` with float32 sums and a float32 result.

    XLA's CPU code supports bfloat16 products with a float32 result only for some
    layouts of the factors, and it chooses the layouts itself. On a CPU the factors are
    therefore widened first. Products of two bfloat16 numbers are exact in float32, so
    only the order of the sums changes.

    >>> einsum("D,D->", jnp.full(3, 256, jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    Array(768., dtype=float32)
    """
    if sharding.platform() == "cpu":
        a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (a, b))
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _by_tiles(a: Array, b: Array, *sizes: int) -> bool:
    if min(sizes) < _LEAST or not cpu.has_amx_tiles():
        return False
    # In a shard_map, results declare the mesh axes they vary over; a kernel's do not.
    return not jax.sharding.get_abstract_mesh().manual_axes and cpu.kernels_fit(a, b)


@jax.custom_vjp
def _linear(x, weight):
    return product(x, weight)


def _forward(x, weight):
    kept = x.value if weight.perturbed else None, weight.value if x.perturbed else None
    return checkpoint_name(product(x.value, weight.value), KEPT), kept


def _backward(kept, d_y):
    x, weight = kept
    if isinstance(d_y, SymbolicZero):
        return None, None
    d_x = None if weight is None else product(d_y, weight, b_along=False)
    d_weight = None if x is None else product(d_y, x, a_along=False, b_along=False)
    return d_x, d_weight


_linear.defvjp(_forward, _backward, symbolic_zeros=True)
