"""Where arrays live: one mesh (data, fsdp, tensor) and one table of rules.

In: the sizes of the mesh, a tree of parameters (or optimiser state). Out: shardings.
One device is the mesh (1, 1, 1), not another code path.
"""

from __future__ import annotations

import math
import re
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


def regroup(mesh: Mesh, tensor: int, *, fsdp: bool = False) -> Mesh:
    """The same devices in groups of `tensor`, each with all of the parameters.

    To decode: what is read at every token is then split, and never gathered. With
    `fsdp` each group has only its share of the parameters.
    """
    if mesh.size % tensor:
        raise GrpoError(
            f"mesh.decode_tensor: {tensor} does not divide the number of devices, "
            f"{mesh.size}"
        )
    groups = mesh.size // tensor
    sizes = (1, groups) if fsdp else (groups, 1)
    return make_mesh(*sizes, tensor, devices=list(mesh.devices.flat))


def spec_of(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The table's answer for one leaf; an axis that does not divide stays whole.

    What only the optimiser reads is spread over "data" too: each of those that hold the
    same parameters moves a share of them.

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
    if path.startswith("opt_state/") and "fsdp" in axes and mesh.shape["data"] > 1:
        both, where = ("fsdp", "data"), axes.index("fsdp")
        if shape[where] % size_of(mesh, both) == 0:
            axes[where] = both
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
    return size_of(mesh, BATCH[0])


def size_of(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """Over how many devices the axes spread what this program sees.

    Inside a shard_map its own axes do not: the program has one part already.
    """
    names = (axes,) if isinstance(axes, str) else (axes or ())
    return math.prod(mesh.shape[name] for name in names if name in free(mesh))


def free(mesh: Mesh | AbstractMesh) -> set[str]:
    """The axes along which the partitioner splits: all but those of a shard_map."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual}


def one_at_a_time(mesh: Mesh, x: Any) -> Any:
    """x, on its way; on a CPU mesh of several devices x when it is there.

    Two programs that both wait for all devices of such a mesh can starve each other;
    an accelerator runs its programs in the order in which they were dispatched.
    """
    several = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(x) if several else x


def mesh_in_use() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set; None where it spreads nothing, or none is.

    Inside a shard_map it is what the shard_map leaves of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return None
    return None if size_of(mesh, AXES) == 1 else mesh


def platform() -> str:
    """The devices that this program is compiled for: "cpu", "gpu" or "tpu".

    The mesh in use knows, also where the machine that compiles has no such devices.
    `jax.lax.platform_dependent` would trace every way on every platform, and cuDNN's
    refuses to be traced without cuDNN; under `grad` it keeps what each would need.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def layout_is_known() -> bool:
    """Whether it is known on which devices this program's arrays lie.

    Not where there are several devices and `jax.set_mesh` has set none of our meshes.
    Only XLA's own operations can be used then: it can split them, but no kernel.
    """
    return mesh_in_use() is not None or alone()


def alone() -> bool:
    """Whether what this program sees lies on one device for certain."""
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.device_count() if mesh.empty else size_of(mesh, mesh.axis_names)) == 1


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Pin an intermediate to the mesh in use; nothing where none is or it can't be."""
    mesh = mesh_in_use()
    if mesh is None:
        return x
    for n, axes in zip(x.shape, spec, strict=False):
        if n % size_of(mesh, axes):
            return x
    return jax.lax.with_sharding_constraint(x, within(spec, mesh))


def within(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The same without the axes of a shard_map that this is inside of."""

    def left(axes):
        names = (axes,) if isinstance(axes, str) else (axes or ())
        return tuple(name for name in names if name in free(mesh)) or None

    return P(*map(left, spec))


def rows_of_table(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """table [V, D] at tokens [B, T], where columns are split over fsdp, and B too.

    Each device looks its columns up for the tokens of all, and rows are exchanged for
    columns: neither the table nor its gradient is ever whole. Left to itself the
    partitioner copies both everywhere.
    """
    mesh = mesh_in_use()
    width = size_of(mesh, "fsdp") if mesh else 1
    if mesh is None or width == 1 or table.shape[1] % width:
        return constrain(table, P("tensor", None))[tokens]
    if tokens.shape[0] % rows_multiple(mesh):
        return constrain(table, P("tensor", None))[tokens]

    def look_up(table, tokens):
        everywhere = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        x = table[everywhere]  # [B of all, T, D / fsdp]
        return jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    rows = within(BATCH, mesh)
    return jax.shard_map(
        look_up,
        in_specs=(P(None, "fsdp"), rows),
        out_specs=rows,
        axis_names=free(mesh) - {"tensor"},
    )(table, tokens)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree's arrays were placed on, if they were placed on one."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            if isinstance(leaf.sharding, NamedSharding):
                mesh = leaf.sharding.mesh
                if isinstance(mesh, Mesh) and set(AXES) <= set(mesh.axis_names):
                    return mesh
    return None


def move(tree: Any, memory: str) -> Any:
    """A tree's arrays in the memory of their devices, or in the host's ("host").

    Raises:
      GrpoError: the devices cannot reach the host's memory.
    """
    kind = {"device": "device", "host": "pinned_host"}[memory]

    def there(x):
        return jax.device_put(x, x.sharding.with_memory_kind(kind))

    try:
        return jax.tree.map(there, tree)
    except ValueError as error:
        raise GrpoError(
            f"config.model.reference_memory: {memory}: these devices refuse it "
            f"({str(error).splitlines()[0]}); set device"
        ) from None


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
