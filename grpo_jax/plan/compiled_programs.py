"""Compiles the programs of a config's step for devices that need not exist.

They are the functions that `training/rl.py` and `training/sft.py` run, traced on shapes
instead of arrays. Of each one the result states the peak memory on a device, the
operations, the bytes sent to other devices, and the least time by the chip's peaks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from grpo_jax.config import Config
from grpo_jax.errors import GrpoError
from grpo_jax.plan import hlo_text
from grpo_jax.plan.chips import Chip, Topology
from grpo_jax.plan.flops import count_flops
from grpo_jax.plan.loop_trip_counts import MeanLengths
from grpo_jax.plan.planned_programs import (
    PlannedProgram,
    bytes_per_device,
    plan_programs,
)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program's figures: bytes of one device, `flops` of all devices together."""

    name: str
    runs: int  # in a step
    peak_memory_bytes: float  # with its arguments; NaN if it did not compile
    held_bytes: float  # of the run's other arrays
    flops: float
    collective_bytes: float  # sent
    collectives: dict[str, float]  # the same by kind
    memory_traffic_bytes: float  # at least: of parameters, state and caches
    trips: dict[str, float]  # scope → assumed trip count
    message: str = ""  # the compiler's, if it ran out of memory

    @property
    def total_bytes(self) -> float:
        """What a device holds while the program runs."""
        return self.peak_memory_bytes + self.held_bytes

    def seconds(self, chip: Chip, devices: int) -> float:
        """Returns the least time of one run: its slowest part hides the other two."""
        return max(self.part_seconds(chip, devices).values())

    def bound_by(self, chip: Chip, devices: int) -> str:
        """Returns the slowest part."""
        parts = self.part_seconds(chip, devices)
        return max(parts, key=lambda name: parts[name])

    def part_seconds(self, chip: Chip, devices: int) -> dict[str, float]:
        """Returns the least time of arithmetic, memory and links, each on its own."""
        return {
            "arithmetic": self.flops / devices / chip.flops_per_second,
            "memory": self.memory_traffic_bytes / chip.memory_bandwidth,
            "links": self.collective_bytes / chip.link_bandwidth,
        }


def compile_programs(
    config: Config,
    topology: Topology,
    lengths: MeanLengths,
    *,
    only: Sequence[str] = (),
    progress: Callable[[str], None] = lambda name: None,
) -> list[CompiledProgram]:
    """Compiles the programs of a step.

    Args:
      config: the run's, checked.
      topology: the devices to compile for.
      lengths: what is assumed of prompts and outputs.
      only: names of the programs to compile; all if it is empty.
      progress: is called with the name of each program before it compiles.

    Raises:
      GrpoError: `only` names no program of the step.
    """
    planned, resident = plan_programs(config, topology, lengths)
    found = []
    for one in planned:
        if only and one.name not in only:
            continue
        progress(one.name)
        found.append(compile_program(one, resident, len(topology.devices)))
    if not found:
        names = ", ".join(one.name for one in planned)
        raise GrpoError(f"--only: {', '.join(only)}: the programs are {names}")
    return found


def compile_program(
    planned: PlannedProgram, resident: Any, devices: int
) -> CompiledProgram:
    """Compiles one program.

    Args:
      planned: the program.
      resident: shapes, with shardings, of all arrays that the step keeps.
      devices: how many devices run it.
    """
    with jax.set_mesh(planned.mesh):
        traced = planned.trace()
        lowered = traced.lower()
        kept = 0.0 if planned.owns_arguments else bytes_per_device(planned.arguments)
        held = bytes_per_device(resident) - kept
        operations = count_flops(traced.jaxpr, planned.trips)
        peak, message, sent = math.nan, "", {}
        try:
            compiled = lowered.compile()
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = _memory_line(str(error))
        else:
            peak = float(compiled.memory_analysis().peak_memory_in_bytes)
            sent = hlo_text.collective_bytes(compiled.as_text(), devices, planned.trips)
    return CompiledProgram(
        name=planned.name,
        runs=planned.runs,
        peak_memory_bytes=peak,
        held_bytes=held,
        flops=operations,
        collective_bytes=sum(sent.values()),
        collectives=sent,
        memory_traffic_bytes=planned.memory_traffic_bytes,
        trips=planned.trips,
        message=message,
    )


def _memory_line(message: str) -> str:
    """Returns the line of the compiler's message that says what memory it needed."""
    lines = [line.strip() for line in message.splitlines()]
    return next((x for x in lines if "hbm" in x.lower()), lines[0])[:200]
