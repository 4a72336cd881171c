"""Layout of arrays over devices: one mesh (data, fsdp, tensor) and one table of rules.

The rules map the path of a leaf of the parameters or optimiser state to its sharding. A
single device is the mesh (1, 1, 1) and takes the same code path.
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

# The first pattern that is found in a leaf's path applies; matrices are [L, out, in].
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
    """Returns a mesh over `devices`, by default over all devices.

    Args:
      data, fsdp, tensor: sizes of the axes. At most one of them may be -1, and then
        takes the devices that are left.
      devices: devices in the order of the mesh, tensor axis fastest.

    Raises:
      GrpoError: the sizes are invalid or do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    bad = [name for name, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1:
        raise GrpoError(f"mesh: {sizes}: sizes are 1 or more, one of them may be -1")
    if free:
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes[free[0]] = max(1, len(devices) // known)
    if math.prod(sizes.values()) != len(devices):
        raise GrpoError(
            f"mesh: data {sizes['data']} × fsdp {sizes['fsdp']} × tensor "
            f"{sizes['tensor']} is not the number of devices, {len(devices)}"
        )
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def regroup_devices(mesh: Mesh, tensor: int, *, fsdp: bool = False) -> Mesh:
    """Returns a mesh of the same devices in groups of `tensor`, for decoding.

    Each group holds all parameters, split over its devices, so that no weights are
    gathered while decoding. With `fsdp` each group holds only its share of them.

    Raises:
      GrpoError: `tensor` does not divide the number of devices.
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
    """Returns the sharding of a leaf by RULES.

    An axis whose size is not a multiple of the mesh axis stays whole. Optimiser state
    is also split over "data", so that devices with the same parameters each update a
    share of them.

    Args:
      path: the leaf's path, with slashes.
      shape: its shape.
      mesh: the mesh.

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
    """Returns a NamedSharding for each leaf of parameters or optimiser state."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def abstract_arrays(tree: Any, mesh: Mesh) -> Any:
    """Returns ShapeDtypeStructs with shardings, for a state that does not exist yet."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings(tree, mesh),
    )


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Returns the sharding of rows over (data, fsdp), after `leading` unsplit axes."""
    return NamedSharding(mesh, P(*(None,) * leading, *BATCH))


def rows_multiple(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of devices over which the rows of a batch are split."""
    return size_of(mesh, BATCH[0])


def size_of(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """Returns over how many devices these axes split the arrays of this program.

    Axes of a surrounding shard_map do not count: the program sees one part only.
    """
    return math.prod(mesh.shape[name] for name in _free_axes(axes, mesh))


def _free_axes(axes: Any, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns those of a spec's axes (a name, several or None) that are `free_axes`."""
    names = (axes,) if isinstance(axes, str) else (axes or ())
    return tuple(name for name in names if name in free_axes(mesh))


def free_axes(mesh: Mesh | AbstractMesh) -> set[str]:
    """Returns the axes that XLA's partitioner splits: all but those of a shard_map."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind != AxisType.Manual}


def wait_on_cpu_mesh(mesh: Mesh, x: Any) -> Any:
    """Returns x, and waits for it first on a CPU mesh of several devices.

    On such a mesh two programs that both need all devices can deadlock. Accelerators
    run their programs in the order of dispatch and need no wait.
    """
    several = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(x) if several else x


def mesh_in_use() -> AbstractMesh | None:
    """Returns the mesh set by `jax.set_mesh`, or None.

    It also returns None for a mesh of another kind and for one that splits nothing.
    Inside a shard_map the axes of the shard_map do not count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return None
    return None if size_of(mesh, AXES) == 1 else mesh


def platform() -> str:
    """Returns the platform this program is compiled for: "cpu", "gpu" or "tpu".

    The mesh in use tells it, also on a machine without such devices. We do not use
    `jax.lax.platform_dependent`: it traces every branch on every platform, the cuDNN
    branch cannot be traced without cuDNN, and `grad` keeps the residuals of all.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def layout_is_known() -> bool:
    """Returns whether this program knows how its arrays are split over devices.

    With several devices and none of our meshes set by `jax.set_mesh` it does not. Then
    only XLA's own operations can be used, as XLA cannot partition a custom kernel.
    """
    return mesh_in_use() is not None or is_one_device()


def is_one_device() -> bool:
    """Returns whether all arrays of this program are certain to be on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.device_count() if mesh.empty else size_of(mesh, mesh.axis_names)) == 1


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Constrains the sharding of an intermediate array on the mesh in use.

    Without a mesh, or if an axis does not divide, it returns x as it is.
    """
    mesh = mesh_in_use()
    sizes = zip(x.shape, spec, strict=False)
    if mesh is None or any(n % size_of(mesh, axes) for n, axes in sizes):
        return x
    return jax.lax.with_sharding_constraint(x, without_manual_axes(spec, mesh))


def without_manual_axes(
    spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns the spec without the axes of a surrounding shard_map."""
    return P(*(_free_axes(axes, mesh) or None for axes in spec))


def rows_of_table(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns table[tokens] for a table whose columns are split over "fsdp".

    Each device looks up its columns for the tokens of all, and an all-to-all exchanges
    columns for rows. Neither the table nor its gradient is gathered, while XLA's
    partitioner on its own would copy both to every device.

    Args:
      table: [V, D].
      tokens: [B, T] int, rows split over `BATCH`.

    Returns:
      [B, T, D], rows split over `BATCH`.
    """
    mesh = mesh_in_use()
    width = size_of(mesh, "fsdp") if mesh else 1
    whole = mesh is None or width == 1 or table.shape[1] % width
    if mesh is None or whole or tokens.shape[0] % rows_multiple(mesh):
        return constrain(table, P("tensor", None))[tokens]

    def look_up(table, tokens):
        everywhere = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        x = table[everywhere]  # [fsdp · B, T, D / fsdp]
        return jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    rows = without_manual_axes(BATCH, mesh)
    return jax.shard_map(
        look_up,
        in_specs=(P(None, "fsdp"), rows),
        out_specs=rows,
        axis_names=free_axes(mesh) - {"tensor"},
    )(table, tokens)


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh on which a tree's arrays were placed, or None."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            if isinstance(leaf.sharding, NamedSharding):
                mesh = leaf.sharding.mesh
                if isinstance(mesh, Mesh) and set(AXES) <= set(mesh.axis_names):
                    return mesh
    return None


def move_to_memory(tree: Any, memory: str) -> Any:
    """Moves a tree's arrays to device memory or to pinned host memory.

    Args:
      tree: the arrays; their shardings are kept.
      memory: "device" or "host".

    Raises:
      GrpoError: these devices have no such memory.
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


def place_on_devices(x: Any, sharding: NamedSharding) -> jax.Array:
    """Returns a sharded array of NumPy data that is the same on every host.

    Each host sends only the parts of its own devices.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> place_on_devices([1, 2], NamedSharding(mesh, P())).tolist()
    [1, 2]
    """
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def fetch_to_hosts(tree: Any) -> Any:
    """Returns a tree of arrays as whole NumPy arrays; every process must call it."""

    def whole(x):
        here = not isinstance(x, jax.Array) or x.is_fully_addressable
        if here or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def packed_shardings(batch: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a packed batch [A, B, T], a tree of arrays.

    Rows B are split over `BATCH`; arrays of another rank are replicated.
    """
    rows, whole = batch_sharding(mesh, leading=1), NamedSharding(mesh, P())
    return jax.tree.map(lambda x: rows if np.ndim(x) == 3 else whole, batch)


def batch_placer(mesh: Mesh):
    """Returns a function that places a packed batch as `packed_shardings` says."""
    return lambda batch: jax.tree.map(
        place_on_devices, batch, packed_shardings(batch, mesh)
    )
