"""How many floating-point operations a program does, counted from its shapes.

In: a traced program (a jaxpr). Out: the operations of its matrix products, on all
devices together: 2 for each multiplication with its addition. What is recomputed for
gradients counts, as it is in the program; elementwise work does not.

XLA's own count takes the body of a loop once; here it counts as often as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_jax.plan.loop_trip_counts import named, share


def flops(jaxpr: Any, trips: Mapping[str, float] | None = None) -> float:
    """The operations of a jaxpr.

    Args:
      jaxpr: of `jax.jit(f).trace(…).jaxpr` or `jax.make_jaxpr(f)(…)`.
      trips: how often loops run whose length is a value, by the name of their scope
        (`jax.named_scope`). A conditional counts as its dearest branch, or the share of
        it that `trips` names; a kernel as if it skipped nothing.

    Raises:
      KeyError: such a loop that `trips` does not name.

    >>> import jax, jax.numpy as jnp
    >>> def f(x):
    ...     return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]
    >>> flops(jax.make_jaxpr(f)(jnp.ones((8, 8)))) == 5 * 2 * 8**3
    True
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, of = equation.primitive.name, equation.params
        if name == "dot_general":
            total += product(equation)
        elif name == "ffi_call":
            total += foreign(equation, trips)
        elif name == "while":
            inner = flops(of["body_jaxpr"], trips) + flops(of["cond_jaxpr"], trips)
            total += inner and inner * named(
                str(equation.source_info.name_stack), trips
            )
        elif name == "cond":
            dearest = max(flops(branch, trips) for branch in of["branches"])
            total += dearest * share(str(equation.source_info.name_stack), trips)
        else:
            inner = sum(flops(x, trips) for x in jaxprs(of.values()))
            total += inner * runs(name, of)
    return total


def product(equation: Any) -> float:
    """2 · the result's size · the contracted axes' sizes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    out = equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(shape[i] for i in contracted)


def foreign(equation: Any, trips: Mapping[str, float] | None) -> float:
    """Of the kernels of `cpu_kernels`, as if every slot saw all columns."""
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
        return a_pair * named("pairs", trips)
    return 0.0


def runs(name: str, parameters: Mapping[str, Any]) -> float:
    """How often what is inside runs, all devices taken together."""
    if name == "scan":
        return parameters["length"]
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid)
    if name == "shard_map":
        mesh, manual = parameters["mesh"], parameters["newly_manual_axes"]
        return math.prod(mesh.shape[axis] for axis in manual)
    return 1.0


def jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif isinstance(value, tuple | list):
            yield from jaxprs(value)
