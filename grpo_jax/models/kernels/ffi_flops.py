"""Counts floating-point operations of the C++ kernels, which XLA cannot see."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def call_flops(equation: Any, pairs: Callable[[], float]) -> float:
    """Returns the floating-point operations of one call of a C++ kernel.

    Decode attention is counted as if every row attended to every column of the cache.

    Args:
      equation: a jaxpr equation whose primitive is `ffi_call`.
      pairs: returns how many pairs of blocks attention visits.

    Returns:
      The count; 0 for a call that is not one of these kernels.
    """
    shapes = [x.aval.shape for x in equation.invars]
    target = equation.params["target_name"]
    if target == "GrpoProduct":
        depth = shapes[0][dict(equation.params["attributes"])["a_along"]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    if target == "GrpoFewRows":
        (out, width), (_, rows) = shapes
        return 2.0 * out * width * rows
    if target == "GrpoDecodeAttention":
        (slots, heads, width), prompts, blocks = shapes[0], shapes[4], shapes[10::3]
        columns = prompts[-1] + sum(places[-1] for places in blocks)
        return 4.0 * slots * heads * width * columns
    if target in ("GrpoBlocksForward", "GrpoBlocksBackward"):
        _, heads, queries, width = shapes[0]
        keys = math.prod(shapes[1][1:]) / heads / width  # of a block
        products = 2 if target == "GrpoBlocksForward" else 5
        a_pair = products * 2.0 * heads * queries * keys * width
        return a_pair * pairs()
    return 0.0
