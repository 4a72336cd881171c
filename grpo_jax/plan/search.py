"""The smallest slice of a chip that a config fits on.

In: a config, a topology, its programs. Out: the first name of the chip's list on which
every program fits. What a program's arguments alone exceed is left out uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo_jax.config import Config
from grpo_jax.errors import GrpoError
from grpo_jax.plan import chips
from grpo_jax.plan.chips import Topology
from grpo_jax.plan.compiled import Program, compile_all, kept_bytes
from grpo_jax.plan.trips import Lengths


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
    kind = topology.chip.name
    for shape in chips.SLICES[kind]:
        name = f"{kind}:{shape}"
        if name == topology.name:
            found: Sequence[Program] = programs
        else:
            try:
                there = chips.topology(name)
                if kept_bytes(config, there, lengths) > topology.chip.memory:
                    continue
                found = compile_all(
                    config, there, lengths, say=lambda what, n=name: say(f"{n}: {what}")
                )
            except GrpoError:  # a mesh that has no place there
                continue
        if all(p.total_bytes <= topology.chip.memory for p in found):
            return name
    return ""
