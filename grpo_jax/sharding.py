"""Where arrays live: one mesh (data, fsdp, tensor) and one table of rules.

In: the sizes of the mesh, a tree of parameters (or optimiser state). Out: shardings.
One device is the mesh (1, 1, 1), not another code path.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax.errors import GrpoError

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")

# The first pattern found in a leaf's path decides; matrices are [L, out, in].
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"layers/(q|k|v|gate|up)_proj$", P(None, "tensor", "fsdp")),
    (r"layers/(o|down)_proj$", P(None, "fsdp", "tensor")),
    (r"layers/(q|k|v|gate|up)_proj_bias$", P(None, "tensor")),
    # LoRA: A [L, r, in] and B [L, out, r] are split as their matrix is.
    (r"layers/(q|k|v|gate|up)_proj_lora_a$", P(None, None, "fsdp")),
    (r"layers/(q|k|v|gate|up)_proj_lora_b$", P(None, "tensor")),
    (r"layers/(o|down)_proj_lora_a$", P(None, None, "tensor")),
    (r"layers/(o|down)_proj_lora_b$", P(None, "fsdp")),
    (r"(^|/)(embed|unembed)$", P("tensor", "fsdp")),
    (r"", P()),  # norms, the other biases, counters
)

BATCH = P(("data", "fsdp"))  # rows are spread over both

# How the same devices hold the weights while they decode: which axes stand in for those
# of the table. A turn of decoding reads every weight: what training splits over fsdp is
# gathered before the first and held whole, unless fsdp is used as tensor is.
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"fsdp": ("fsdp",), "tensor": ("tensor",)},
    "gathered": {"fsdp": (), "tensor": ("tensor",)},  # once, layers together
    "tensor": {"fsdp": (), "tensor": ("fsdp", "tensor")},  # never
}
_layout: ContextVar[str] = ContextVar("layout", default="train")


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """The mesh over `devices` (all there are by default); fsdp=-1 takes the rest."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    bad = [name for name, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1:
        raise GrpoError(f"mesh: {sizes}: sizes are 1 or more, one of them may be -1")
    if free:
        known = int(np.prod([size for size in sizes.values() if size != -1]))
        sizes[free[0]] = max(1, len(devices) // known)
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise GrpoError(
            f"mesh: data {sizes['data']} × fsdp {sizes['fsdp']} × tensor "
            f"{sizes['tensor']} is not the number of devices, {len(devices)}"
        )
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def spec_of(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The table's answer for one leaf; an axis that does not divide stays whole.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> spec_of("layers/q_proj", (2, 8, 4), mesh)
    P(None, 'tensor', 'fsdp')
    """
    rule = next(spec for pattern, spec in RULES if re.search(pattern, path))
    if len(rule) > len(shape):
        return P()
    axes = [
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for size, axis in zip(shape, rule, strict=False)
    ]
    return P(*axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of parameters or optimiser state."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs with shardings: the shape of a state that is not there yet."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings(tree, mesh),
    )


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Rows over (data, fsdp), after `leading` axes that are not split."""
    return NamedSharding(mesh, P(*(None,) * leading, *BATCH))


def rows_multiple(mesh: Mesh | AbstractMesh) -> int:
    """A batch's row count must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def one_at_a_time(mesh: Mesh, x: Any) -> Any:
    """x, on its way; on a CPU mesh of several devices x when it is there.

    Two programs that both wait for all devices of such a mesh can starve each other;
    an accelerator runs its programs in the order in which they were dispatched.
    """
    several = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(x) if several else x


def mesh_in_use() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set; None where that is one device or none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):
        return None
    return mesh


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Pin an intermediate to the mesh in use; nothing where none is or it can't be.

    Where weights are not gathered, fsdp is an axis of theirs and not of the rows.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return x
    if _layout.get() == "tensor":
        stand_ins = {"data": ("data",), **LAYOUTS["tensor"]}
        spec = P(
            *(
                None if axes is None else sum((stand_ins[a] for a in _names(axes)), ())
                for axes in spec
            )
        )
    return _pin(x, spec, mesh)


def _names(axes: Any) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _pin(x: jax.Array, spec: PartitionSpec, mesh: AbstractMesh) -> jax.Array:
    for n, axes in zip(x.shape, spec, strict=False):
        if n % int(np.prod([mesh.shape[name] for name in _names(axes)])):
            return x
    return jax.lax.with_sharding_constraint(x, spec)


def in_layout(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(model, params, …) for jit, with a static `layout` of `LAYOUTS`."""

    def moved(model, params, *arguments, layout: str = "train", **options):
        token = _layout.set(layout)
        try:
            return function(model, relayout(params), *arguments, **options)
        finally:
            _layout.reset(token)

    moved.__name__ = function.__name__
    return moved


def relayout(params: Any) -> Any:
    """Parameters as the present layout has them; under jit, with a mesh in use."""
    stand_ins, mesh = LAYOUTS[_layout.get()], mesh_in_use()
    if mesh is None or _layout.get() == "train":
        return params

    def put(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = spec_of(name, x.shape, mesh)
        axes = [None if axis is None else stand_ins[axis] for axis in spec]
        return _pin(x, P(*axes), mesh)

    return jax.tree_util.tree_map_with_path(put, params)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree's arrays were placed on, if they were placed on one."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            if isinstance(leaf.sharding, NamedSharding):
                mesh = leaf.sharding.mesh
                if isinstance(mesh, Mesh) and set(AXES) <= set(mesh.axis_names):
                    return mesh
    return None


def to_devices(x: Any, sharding: NamedSharding) -> jax.Array:
    """NumPy's numbers, the same on every host, laid out: each host sends its own part.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> to_devices([1, 2], NamedSharding(mesh, P())).tolist()
    [1, 2]
    """
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def to_hosts(tree: Any) -> Any:
    """A tree of arrays as NumPy's, whole on every host; all of them must call it."""

    def whole(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            if not x.is_fully_replicated:
                x = multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def batch_placer(mesh: Mesh):
    """A function that puts a packed batch [A, B, T] on the mesh: rows over BATCH."""
    rows, whole = batch_sharding(mesh, leading=1), NamedSharding(mesh, P())

    def place(batch: Any) -> Any:
        return jax.tree.map(
            lambda x: to_devices(x, rows if np.ndim(x) == 3 else whole), batch
        )

    return place
