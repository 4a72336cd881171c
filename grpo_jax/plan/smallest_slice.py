"""The smallest slice of a chip that a config fits on.

In: a config, a topology, its programs. Out: the first name of the chip's list on which
every program fits. Where what a step keeps is too much already nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo_jax.config import Config
from grpo_jax.errors import GrpoError
from grpo_jax.plan import chips
from grpo_jax.plan.chips import Topology
from grpo_jax.plan.compiled_programs import Program, compile_one, local_bytes, prepare
from grpo_jax.plan.loop_trip_counts import Lengths


def smallest(
    config: Config,
    topology: Topology,
    programs: Sequence[Program],
    lengths: Lengths,
    *,
    say: Callable[[str], None] = lambda what: None,
) -> str:
    """Its name; "" where the config fits on none of the list."""
    assert topology.chip is not None
    kind, memory = topology.chip.name, topology.chip.memory
    for shape in chips.SLICES[kind]:
        name = f"{kind}:{shape}"
        if name == topology.name:
            fits = all(p.total_bytes <= memory for p in programs)
        else:
            fits = fits_on(
                config, name, memory, lengths, lambda what, n=name: say(f"{n}: {what}")
            )
        if fits:
            return name
    return ""


def fits_on(
    config: Config,
    name: str,
    memory: float,
    lengths: Lengths,
    say: Callable[[str], None],
) -> bool:
    """Whether all programs do; the first that does not is the last to be compiled."""
    try:
        there = chips.topology(name)
        asked, resident = prepare(config, there, lengths)
    except GrpoError:  # a mesh that has no place there
        return False
    if local_bytes(resident) > memory:
        return False
    for one in reversed(asked):  # the update is the fastest to compile, and large
        say(one.name)
        if not compile_one(one, resident, len(there.devices)).total_bytes <= memory:
            return False
    return True
