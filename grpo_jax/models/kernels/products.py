"""Products of matrices by the fastest way there is.

In: two factors, each with the axis that is summed over as its last ("along") or its
first. Out: their product. It is XLA's, but for large ones in float32 on a CPU with
bfloat16 tiles (AMX): these are `cpu_kernels`', of six products of bfloat16 parts, about
twice as fast. Their error, for numbers between 1e-33 and 3.39e38, is that of float32
sums in another order: 0.5 to 1.3 times XLA's for sums of up to 1536 terms, and up to
2.4 times for sums of 4096 terms of one sign or of a wide range of magnitudes.

Pure; imports jax alone. Axes: M rows, D and F width, N columns, K what is summed over.
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

_LEAST = 128  # of an axis: smaller matrices are not worth taking apart
KEPT = "product"  # by this name `jax.checkpoint` may keep a product of the kernel


def linear(x: Float[Array, "M D"], weight: Float[Array, "F D"]) -> Float[Array, "M F"]:
    """x weightᵀ. On tiles its gradient is there once and in reverse, as attention's.

    >>> linear(jnp.ones((2, 3)), jnp.ones((5, 3))).shape
    (2, 5)
    """
    if _by_tiles(x, weight, len(x), len(weight), x.shape[1]):
        return _linear(x, weight)
    return jnp.einsum("MD,FD->MF", x, weight)


def product(
    a: Array, b: Array, *, a_along: bool = True, b_along: bool = True
) -> Float[Array, "M N"]:
    """Σ_k a b, in float32, for use where gradients are made by hand.

    Args:
      a: [M, K] if `a_along`, else [K, M].
      b: [N, K] if `b_along`, else [K, N].

    >>> product(jnp.ones((4, 2)), jnp.ones((4, 3)), a_along=False, b_along=False)[0, 0]
    Array(4., dtype=float32)
    """
    (m, k), n = a.shape[:: 1 if a_along else -1], b.shape[0 if b_along else 1]
    if _by_tiles(a, b, m, n, k):
        return cpu.product(a, b, a_along, b_along)
    axes = f"{'MK' if a_along else 'KM'},{'NK' if b_along else 'KN'}->MN"
    return einsum(axes, a, b)


def einsum(axes: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two factors with float32 sums and a float32 result.

    >>> einsum("D,D->", jnp.full(3, 256, jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    Array(768., dtype=float32)
    """
    return jnp.einsum(axes, *widened(a, b), preferred_element_type=jnp.float32)


def widened(*factors: Array) -> tuple[Array, ...]:
    """Factors of a product whose result is float32: on a CPU they are float32 too.

    XLA's CPU code multiplies bfloat16 into float32 for some layouts of the factors and
    fails for others, and which layouts they get is its own choice. Products of two
    bfloat16 numbers are exact in float32, so widening changes the order of sums alone.
    """
    if sharding.platform() != "cpu":
        return factors
    return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in factors)


def _by_tiles(a: Array, b: Array, *sizes: int) -> bool:
    if min(sizes) < _LEAST or not cpu.tiles():
        return False
    # In a shard_map results must say along which axes they vary; a kernel's do not.
    return not jax.sharding.get_abstract_mesh().manual_axes and cpu.fit(a, b)


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
