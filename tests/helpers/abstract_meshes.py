"""Meshes of devices that are not here."""

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from grpo_jax.distributed import sharding


def mesh_of(where: str, *sizes: int, axes=sharding.AXES) -> AbstractMesh:
    """A mesh of devices that are not here."""
    device = AbstractDevice(device_kind=where, num_cores=1, platform=where)
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(sizes, axes, axis_types=types, abstract_device=device)
