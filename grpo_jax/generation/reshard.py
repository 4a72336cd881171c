"""Parameters on the mesh that decodes.

In: parameters as they are trained, and a mesh of the same devices (`sharding.regroup`).
Out: the same in the dtype of the computation, whole within each group of devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax.distributed import sharding
from grpo_jax.models.decoder import Decoder, Params


def relaid(model: Decoder, params: Params, layout: Mesh) -> Params:
    """Parameters on the mesh that decodes, in the dtype of the computation."""
    return relay(model, params, layout)(params)


def relay(model: Decoder, params: Params, layout: Mesh) -> Any:
    """The compiled `relaid` for such parameters.

    In two steps, which XLA knows how to take: rows of matrices for columns within the
    groups of devices, and then between the groups what is missing in each.
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
