"""python -m grpo_jax.plan --config configs/7b.py --topology v5p:4x4x4

Compiles what a step of the config runs, for a pod that need not be there, and prints
what it needs. `--topology here` takes the devices of this machine.
"""

from __future__ import annotations

import json
import math
import os
import sys

# Before jax is imported: it would look for a TPU of this machine, or for a cloud's.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from absl import flags

from grpo_jax import train
from grpo_jax.errors import GrpoError

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5p:4x4x4 and the like, or here")
_JSON = flags.DEFINE_bool("json", False, "one JSON object instead of the table")
_OUTPUT = flags.DEFINE_float("mean_output", None, "tokens of an output, on average", 1)
_PROMPT = flags.DEFINE_float("mean_prompt", None, "tokens of a question, on average", 1)
_PRICE = flags.DEFINE_float("price", None, "dollars a chip and hour", 0)
_ONLY = flags.DEFINE_list("only", [], "programs to compile, by name; all by default")
_SMALLEST = flags.DEFINE_bool(
    "smallest", True, "look for the smallest slice of this chip that it fits on, too"
)


def main(argv: list[str] | None = None) -> None:
    try:
        print(plan(sys.argv if argv is None else argv))
    except GrpoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def plan(argv: list[str]) -> str:
    config = train.parse(argv)
    if not _TOPOLOGY.value:
        raise GrpoError("--topology: name a pod, as v5p:4x4x4, or here")
    for flag in (_OUTPUT, _PROMPT, _PRICE):
        if flag.value is not None and not math.isfinite(flag.value):
            raise GrpoError(f"--{flag.name}: {flag.value}; a finite number is needed")
    from grpo_jax.plan import chips, plan_table, smallest_slice
    from grpo_jax.plan.compiled_programs import compile_all
    from grpo_jax.plan.loop_trip_counts import Lengths

    topology = chips.topology(_TOPOLOGY.value)
    lengths = Lengths.assumed(config, _PROMPT.value, _OUTPUT.value)
    programs = compile_all(config, topology, lengths, only=_ONLY.value, say=say)
    smallest = None
    if _SMALLEST.value and topology.chip and not _ONLY.value:
        smallest = smallest_slice.smallest(config, topology, programs, lengths, say=say)
    found = plan_table.report(
        config, topology, programs, lengths, price=_PRICE.value, smallest=smallest
    )
    return json.dumps(found, indent=2) if _JSON.value else plan_table.table(found)


def say(what: str) -> None:
    """Progress, beside the result."""
    print(f"compiling {what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
