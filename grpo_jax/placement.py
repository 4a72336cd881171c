"""Parameters where they decode: on the mesh of groups of devices that sample.

In: parameters as they are trained. Out: that mesh, and the parameters there.
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.model import Decoder, Params


@functools.partial(jax.jit, static_argnames=("model", "layout"))
def relaid(model: Decoder, params: Params, layout: Mesh) -> Params:
    """Parameters on the mesh that decodes, in the dtype of the computation.

    In two steps, which XLA knows how to take: rows of matrices for columns within the
    groups of devices, and then between the groups what is missing in each.
    """
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)
    for fsdp in (True, False):
        mesh = sharding.regroup(layout, layout.shape["tensor"], fsdp=fsdp)
        where = sharding.shardings(params, mesh)
        params = jax.lax.with_sharding_constraint(params, where)
    return params


def is_laid_out(model: Decoder, params: Params, layout: Mesh) -> bool:
    """Whether the parameters are there already."""
    where = sharding.shardings(params, layout)

    def here(x, sharding) -> bool:
        same = x.sharding.is_equivalent_to(sharding, len(x.shape))
        return same and x.dtype == model.dtype

    return all(jax.tree.leaves(jax.tree.map(here, params, where)))


def laid_out(model: Decoder, params: Params) -> tuple[Mesh | None, Params]:
    """The mesh that decodes, and the parameters there; None and they on one device."""
    mesh = sharding.mesh_of(params)
    if mesh is None or mesh.size == 1:
        return None, params
    layout = sharding.regroup(mesh, model.decode_tensor or mesh.shape["tensor"])
    if is_laid_out(model, params, layout):
        return layout, params
    return layout, relaid(model, params, layout)
