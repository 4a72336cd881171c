"""Finds the smallest slice of a chip on which every program of a config fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo_jax.config import Config
from grpo_jax.errors import GrpoError
from grpo_jax.plan import chips
from grpo_jax.plan.chips import Topology
from grpo_jax.plan.compiled_programs import CompiledProgram, compile_program
from grpo_jax.plan.loop_trip_counts import MeanLengths
from grpo_jax.plan.planned_programs import bytes_per_device, plan_programs


def find_smallest_slice(
    config: Config,
    topology: Topology,
    programs: Sequence[CompiledProgram],
    lengths: MeanLengths,
    *,
    progress: Callable[[str], None] = lambda name: None,
) -> str:
    """Returns the first of `chips.SLICES` that the config fits on; "" if none.

    Args:
      config: the run's.
      topology: devices for which the programs are compiled already.
      programs: those programs.
      lengths: what is assumed of prompts and outputs.
      progress: is called with the name of each slice and program before it compiles.
    """
    assert topology.chip is not None
    kind, memory = topology.chip.name, topology.chip.memory_bytes
    for shape in chips.SLICES[kind]:
        name = f"{kind}:{shape}"
        if name == topology.name:
            fits = all(p.total_bytes <= memory for p in programs)
        else:
            fits = fits_on_slice(config, name, memory, lengths, progress)
        if fits:
            return name
    return ""


def fits_on_slice(
    config: Config,
    name: str,
    memory_bytes: float,
    lengths: MeanLengths,
    progress: Callable[[str], None],
) -> bool:
    """Returns whether every program fits in a chip's memory.

    Compiles nothing if what a step keeps is too much already, and stops at the first
    program that does not fit.
    """
    try:
        topology = chips.get_topology(name)
        planned, resident = plan_programs(config, topology, lengths)
    except GrpoError:  # the mesh does not fit these devices
        return False
    if bytes_per_device(resident) > memory_bytes:
        return False
    for one in reversed(planned):  # the update is the fastest to compile, and large
        progress(f"{name}: {one.name}")
        compiled = compile_program(one, resident, len(topology.devices))
        if not compiled.total_bytes <= memory_bytes:  # also where it is NaN
            return False
    return True
