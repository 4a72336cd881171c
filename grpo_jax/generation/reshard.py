"""Moves parameters from the training mesh to the decoding mesh of the same devices.

For decoding, each group of devices holds all parameters, in the compute dtype
(`sharding.regroup_devices`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.models.decoder import Decoder, Params


def decoding_mesh(model: Decoder, mesh: Mesh) -> Mesh:
    """Returns the mesh of the same devices, in groups, on which the model decodes.

    Raises:
      GrpoError: `decode_tensor` does not divide the number of devices; or it does not
        divide the heads, on TPUs, whose compiler would abort the process.
    """
    tensor, heads = model.decode_tensor or mesh.shape["tensor"], model.config.heads
    layout = sharding.regroup_devices(mesh, tensor)
    if heads % tensor and mesh.devices.flat[0].platform == "tpu":
        raise GrpoError(
            f"mesh.decode_tensor: {tensor} does not divide the model's heads, {heads}, "
            f"as TPUs need; set it to {math.gcd(tensor, heads)}"
        )
    return layout


def make_resharding(model: Decoder, params: Params, layout: Mesh) -> Any:
    """Returns the compiled function that moves parameters of these shapes to `layout`.

    It casts them to the model's compute dtype. They move in two steps, each of which
    XLA partitions well: an exchange of rows for columns within the groups of devices,
    and then an all-gather between groups.

    Args:
      model: the decoder, which gives the dtype.
      params: the parameters, or their shapes.
      layout: the decoding mesh.
    """
    leaves, tree = jax.tree.flatten(params)
    return _compile_resharding(
        model.dtype, layout, tree, tuple(x.shape for x in leaves)
    )


@functools.cache
def _compile_resharding(dtype: str, layout: Mesh, tree: Any, shapes: tuple) -> Any:
    like = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, dtype) for s in shapes])
    within = sharding.regroup_devices(layout, layout.shape["tensor"], fsdp=True)
    first = sharding.shardings(like, within)

    def move(params):
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return jax.lax.with_sharding_constraint(params, first)

    return jax.jit(move, out_shardings=sharding.shardings(like, layout))


def is_resharded(model: Decoder, params: Params, layout: Mesh) -> bool:
    """Returns whether the parameters have this layout and the compute dtype already."""
    trees = params, sharding.shardings(params, layout)
    return all(
        x.dtype == model.dtype and x.sharding.is_equivalent_to(place, len(x.shape))
        for x, place in zip(*map(jax.tree.leaves, trees), strict=True)
    )


def reshard_for_decoding(model: Decoder, params: Params) -> tuple[Mesh | None, Params]:
    """Returns the decoding mesh and the parameters on it.

    On a single device the mesh is None and the parameters are returned as they are.
    """
    mesh = sharding.mesh_of(params)
    if mesh is None or mesh.size == 1:
        return None, params
    layout = decoding_mesh(model, mesh)
    if not is_resharded(model, params, layout):
        params = make_resharding(model, params, layout)(params)
    return layout, params
