"""Counts the floating-point operations of a program from the shapes in its jaxpr.

A multiplication with its addition counts as 2. Matrix products count, on all devices
together, and so does what is recomputed for gradients; elementwise work does not. XLA's
own count takes the body of a loop once. Here it counts as often as the loop runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_jax.models.kernels.ffi_flops import call_flops
from grpo_jax.plan.loop_trip_counts import conditional_share, loop_trip_count


def count_flops(jaxpr: Any, trips: Mapping[str, float] | None = None) -> float:
    """Returns the operations of one run of a program.

    A conditional counts as its most expensive branch, times its share in `trips` if it
    has one. A kernel counts as if it skipped nothing.

    Args:
      jaxpr: `jax.jit(f).trace(…).jaxpr` or `jax.make_jaxpr(f)(…)`.
      trips: scope (`jax.named_scope`) → count, of loops whose length is a value.

    Raises:
      KeyError: `trips` lacks such a loop.

    >>> import jax, jax.numpy as jnp
    >>> def f(x):
    ...     return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]
    >>> count_flops(jax.make_jaxpr(f)(jnp.ones((8, 8)))) == 5 * 2 * 8**3
    True
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        scope = str(equation.source_info.name_stack)
        if name == "dot_general":
            total += product_flops(equation)
        elif name == "ffi_call":
            total += call_flops(
                equation, functools.partial(loop_trip_count, "pairs", trips)
            )
        elif name == "while":
            inner = count_flops(params["body_jaxpr"], trips)
            inner += count_flops(params["cond_jaxpr"], trips)
            total += inner and inner * loop_trip_count(scope, trips)
        elif name == "cond":
            branches = [count_flops(branch, trips) for branch in params["branches"]]
            total += max(branches) * conditional_share(scope, trips)
        else:
            inner = sum(count_flops(x, trips) for x in nested_jaxprs(params.values()))
            total += inner * inner_runs(name, params)
    return total


def product_flops(equation: Any) -> float:
    """Returns the operations of a product: 2 · result size · contracted sizes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    out = equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(shape[i] for i in contracted)


def inner_runs(name: str, parameters: Mapping[str, Any]) -> float:
    """Returns how often the jaxprs inside an equation run, on all devices together."""
    if name == "scan":
        return parameters["length"]
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid)
    if name == "shard_map":
        mesh, manual = parameters["mesh"], parameters["newly_manual_axes"]
        return math.prod(mesh.shape[axis] for axis in manual)
    return 1.0


def nested_jaxprs(values: Any) -> Iterator[Any]:
    """Returns the jaxprs among the parameters of an equation."""
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif isinstance(value, tuple | list):
            yield from nested_jaxprs(value)
