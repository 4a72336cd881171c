"""python -m grpo_jax.plan --config configs/7b.py --topology v5p:4x4x4

Compiles the programs of the config's step for a pod that need not exist, and prints
what they need. `--topology here` takes the devices of this machine.
"""

from __future__ import annotations

import json
import math
import os
import sys

# Set before jax is imported, which would look for a TPU here or for a cloud's server.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from absl import flags

from grpo_jax.errors import GrpoError, errors_as_one_line
from grpo_jax.training.command_line import parse_config, print_help

USAGE = "usage: python -m grpo_jax.plan --config FILE --topology v5p:4x4x4 [--json]"

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5p:4x4x4 and the like, or here")
_JSON = flags.DEFINE_bool("json", False, "one JSON object instead of the table")
_OUTPUT = flags.DEFINE_float("mean_output", None, "tokens of an output, on average", 1)
_PROMPT = flags.DEFINE_float("mean_prompt", None, "tokens of a question, on average", 1)
_PRICE = flags.DEFINE_float("price", None, "dollars a chip and hour", 0)
_ONLY = flags.DEFINE_list("only", None, "programs to compile, by name; all by default")
_SMALLEST = flags.DEFINE_bool(
    "smallest", True, "look for the smallest slice of this chip that it fits on, too"
)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; a mistake ends it with one line."""
    argv = sys.argv if argv is None else argv
    names = "topology json mean_output mean_prompt price only smallest"
    print_help(argv, USAGE, names.split())
    try:
        with errors_as_one_line():
            print(make_plan(argv))
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def make_plan(argv: list[str]) -> str:
    """Returns the plan that the flags ask for, as a table or as JSON."""
    config = parse_config(argv, USAGE)
    if not _TOPOLOGY.value:
        raise GrpoError("--topology: name a pod, as v5p:4x4x4, or here")
    for flag in (_OUTPUT, _PROMPT, _PRICE):
        if flag.value is not None and not math.isfinite(flag.value):
            raise GrpoError(f"--{flag.name}: {flag.value}; a finite number is needed")
    from grpo_jax.plan.chips import get_topology
    from grpo_jax.plan.compiled_programs import compile_programs
    from grpo_jax.plan.loop_trip_counts import MeanLengths
    from grpo_jax.plan.plan_table import format_plan, summarize_plan
    from grpo_jax.plan.smallest_slice import find_smallest_slice

    topology = get_topology(_TOPOLOGY.value)
    lengths = MeanLengths.for_config(config, _PROMPT.value, _OUTPUT.value)
    programs = compile_programs(
        config, topology, lengths, only=_ONLY.value or [], progress=print_progress
    )
    smallest = None
    if _SMALLEST.value and topology.chip and not _ONLY.value:
        smallest = find_smallest_slice(
            config, topology, programs, lengths, progress=print_progress
        )
    summary = summarize_plan(
        config, topology, programs, lengths, price=_PRICE.value, smallest=smallest
    )
    return json.dumps(summary, indent=2) if _JSON.value else format_plan(summary)


def print_progress(name: str) -> None:
    """Prints to stderr what is being compiled; stdout has the plan alone."""
    print(f"compiling {name} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
