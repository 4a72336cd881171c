"""Checksums of a state's leaves, computed on the devices that hold them.

A checksum is Σ_i h(bits of element i, i) modulo 2**32. An integer sum does not depend
on its order, so the checksum does not depend on the mesh. For each i, h is a bijection
of the bits, so changing one element always changes the sum. The same pass tests whether
all numbers are finite; a state that is not finite is neither saved nor restored.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.errors import GrpoError


@jax.jit
def _checksum_and_finite(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the uint32 checksum of `x` and whether all its numbers are finite."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    width = min((jnp.finfo if floating else jnp.iinfo)(x.dtype).bits, 32)
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    finite = jnp.isfinite(x) if floating else jnp.ones(x.shape, bool)
    if bits.ndim > x.ndim:  # 64-bit numbers have a last axis of two words
        finite = jnp.broadcast_to(finite[..., None], bits.shape)
    index = jnp.uint32(0)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index + place * jnp.uint32(stride)
    h = bits ^ (index * jnp.uint32(0x9E3779B9))
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)  # an odd factor is invertible
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    # Reducing both at once reads the leaf once.
    return jax.lax.reduce(
        (h ^ (h >> 16), finite),
        (jnp.uint32(0), jnp.bool_(True)),
        lambda a, b: (a[0] + b[0], a[1] & b[1]),
        tuple(range(bits.ndim)),
    )


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns a tree's leaves by name, such as `params/layers/q_proj`.

    Raises:
      GrpoError: two leaves have the same name.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise GrpoError(f"state: two leaves are named {name}; rename one")
        leaves[name] = leaf
    return leaves


def checksum_leaves(leaves: dict[str, Any]) -> tuple[dict[str, list[Any]], list[str]]:
    """Returns the kind and checksum of each leaf, and which leaves are not finite.

    Args:
      leaves: jax arrays by name, as of `named_leaves`.

    Returns:
      {name: [kind, checksum]}, and the names of the leaves that are not finite.
    """
    # One at a time: on forced CPU devices, programs with collectives block each other.
    found = {
        name: [int(value) for value in _checksum_and_finite(x)]
        for name, x in leaves.items()
    }
    described = {
        name: [dtype_and_shape(x), found[name][0]] for name, x in leaves.items()
    }
    return described, [name for name, (_, finite) in found.items() if not finite]


def first_and_count(names: list[str]) -> str:
    """Returns the first name and how many more there are, for messages."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def dtype_and_shape(x: Any) -> str:
    """Returns an array's dtype and shape as text, such as "float32[2, 3]"."""
    return f"{x.dtype}{list(x.shape)}"
