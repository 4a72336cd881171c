"""Moves parameters from the training mesh to the decoding mesh of the same devices.

For decoding, each group of devices holds all parameters, in the compute dtype
(`sharding.regroup`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax.distributed import sharding
from grpo_jax.models.decoder import Decoder, Params


def relaid(model: Decoder, params: Params, layout: Mesh) -> Params:
    """Returns the parameters on the mesh `layout`, in the model's compute dtype."""
    return relay(model, params, layout)(params)


def relay(model: Decoder, params: Params, layout: Mesh) -> Any:
    """Returns the compiled function behind `relaid`, for parameters of these shapes.

    It moves them in two steps, each of which XLA partitions well: an exchange of rows
    for columns within the groups of devices, and then an all-gather between groups.

    Args:
      model: the decoder, which gives the dtype.
      params: the parameters, or their shapes.
      layout: the decoding mesh.
    """
    leaves, tree = jax.tree.flatten(params)
    return _relay(model.dtype, layout, tree, tuple(x.shape for x in leaves))


@functools.cache
def _relay(dtype: str, layout: Mesh, tree: Any, shapes: tuple) -> Any:
    like = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(s, dtype) for s in shapes])
    within = sharding.regroup(layout, layout.shape["tensor"], fsdp=True)
    first = sharding.shardings(like, within)

    def move(params):
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return jax.lax.with_sharding_constraint(params, first)

    return jax.jit(move, out_shardings=sharding.shardings(like, layout))


def is_laid_out(model: Decoder, params: Params, layout: Mesh) -> bool:
    """Returns whether the parameters have this layout and the compute dtype already."""
    where = sharding.shardings(params, layout)

    def here(x, sharding) -> bool:
        same = x.sharding.is_equivalent_to(sharding, len(x.shape))
        return same and x.dtype == model.dtype

    return all(jax.tree.leaves(jax.tree.map(here, params, where)))


def laid_out(model: Decoder, params: Params) -> tuple[Mesh | None, Params]:
    """Returns the decoding mesh and the parameters on it.

    On a single device the mesh is None and the parameters are returned as they are.
    """
    mesh = sharding.mesh_of(params)
    if mesh is None or mesh.size == 1:
        return None, params
    layout = sharding.regroup(mesh, model.decode_tensor or mesh.shape["tensor"])
    if is_laid_out(model, params, layout):
        return layout, params
    return layout, relaid(model, params, layout)
