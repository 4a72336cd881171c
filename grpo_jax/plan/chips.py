"""Published figures of TPU chips, and the devices of a topology that need not exist.

Peaks are those for bfloat16. Prices are Google's list prices on demand in US regions,
2025; they are good for comparisons only, and --price sets another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from grpo_jax.errors import GrpoError

INSTALL = (
    "plan: libtpu is not installed, which compiles for TPUs that are not there; "
    "python -m pip install 'jax[tpu]'"
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's published figures."""

    name: str
    memory_bytes: float
    flops_per_second: float  # in bfloat16
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that it sends to all neighbours together
    dollars_per_hour: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * 2**30, 197e12, 819e9, 200e9, 1.20),
        Chip("v5p", 95 * 2**30, 459e12, 2765e9, 600e9, 4.20),
        Chip("v6e", 32 * 2**30, 918e12, 1640e9, 400e9, 2.70),
    )
}
# Of each chip the slices that `smallest_slice` tries, from small to large.
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that programs are compiled for."""

    name: str
    chip: Chip | None  # None for the devices of this machine
    devices: Sequence[Any]


def get_topology(name: str) -> Topology:
    """Returns the devices of a topology.

    Args:
      name: chip and shape, as v5p:4x4x4, or `here` for the devices of this machine.

    Raises:
      GrpoError: there is no such chip or shape, or libtpu is not installed.

    >>> get_topology("v5p:4x4")
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: --topology: v5p:4x4: v5p has three sizes, as v5p:2x2x1
    """
    if name == "here":
        return Topology(name, None, jax.devices())
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise GrpoError(f"--topology: {name}: give {', '.join(CHIPS)}:SHAPE, or here")
    dimensions = len(SLICES[kind][0].split("x"))
    if not re.fullmatch(r"\d+" + r"x\d+" * (dimensions - 1), shape):
        count = {2: "two", 3: "three"}[dimensions]
        example = f"{kind}:{SLICES[kind][0]}"
        raise GrpoError(f"--topology: {name}: {kind} has {count} sizes, as {example}")
    if importlib.util.find_spec("libtpu") is None:
        raise GrpoError(INSTALL)
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it looks for a cloud's server
    # It uses no TPU, so it need not wait for another process that does.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        with silence_stderr():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise GrpoError(f"--topology: {name}: libtpu refuses it ({reason})") from None
    return Topology(name, CHIPS[kind], found.devices)


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Drops what libraries write to the standard error past Python."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
