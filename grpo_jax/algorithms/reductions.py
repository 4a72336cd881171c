"""What the objectives share: how arrays of tokens become one number, and how to ask.

In: per-token terms ℓ and weights m, [B, T], and how to divide. Out: scalars. Here too:
the checks of shapes and options, and `jitted`, under which every loss is compiled.

Axes: B rows, T tokens. A row is one output o_i, or, with `segment_ids`, several.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from jaxtyping import Array, ArrayLike

P = ParamSpec("P")
R = TypeVar("R")
AGGREGATES = ("sequence_mean", "token_mean", "constant", "sequence_sum")


def jitted(
    *static: str, pairs: Mapping[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """jax.jit that keeps the signature; numbers are traced, `static` names are not.

    pairs: {"kl_coef": "ref_logps"}: the coefficient of an optional array. A known 0
    without the array is passed on as None, as under jit it could not be told from
    another number.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        compiled = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            for coefficient, array in (pairs or {}).items():
                known = coefficient in options and is_off(options[coefficient])
                if known and options.get(array) is None:
                    options[coefficient] = None
            return compiled(*args, **options)

        return call

    return decorate


def is_off(coefficient: Any) -> bool:
    """Whether a coefficient is known to be 0 (None: `jitted` has seen a 0)."""
    if coefficient is None:
        return True
    return not isinstance(coefficient, jax.core.Tracer) and bool(coefficient == 0)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def check_shapes(
    first: Array, others: Mapping[str, Array | None], name="logps"
) -> None:
    if jnp.ndim(first) != 2:
        raise ValueError(f"{name} has shape {jnp.shape(first)}; [B, T] is needed")
    for other, x in others.items():
        if x is not None and jnp.shape(x) != jnp.shape(first):
            raise ValueError(
                f"{other} has shape {jnp.shape(x)}, {name} {jnp.shape(first)}"
            )


def weight_of(mask: Array, *arrays: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The mask as weights m, in float32 or the arrays' wider type, and `clean`.

    clean(x) is x where m is not 0 and 0 elsewhere: nothing masked reaches an exponent,
    a product or a gradient.
    """
    mask = jnp.asarray(mask)
    dtype = jnp.result_type(jnp.float32, *(jnp.asarray(x).dtype for x in arrays))
    valid = mask != 0

    def clean(x: Array) -> Array:
        return jnp.where(valid, jnp.asarray(x).astype(dtype), 0)

    return clean(mask), clean


def sequence_sums(x: Array, segment_ids: Array | None) -> Array:
    """[B, T] -> [B, T]: at each token, the sum of x over the token's own sequence."""
    if segment_ids is None:
        return jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    run = jnp.cumsum(jnp.pad(starts, ((0, 0), (1, 0))), axis=-1)  # the run's number
    sums = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=x.shape[1]))
    return jnp.take_along_axis(sums(x, run), run, axis=-1)


def count_sequences(
    valid: Array, segment_ids: Array | None, num_segments: int | None
) -> Array | int:
    """How many sequences the rows hold, those without an unmasked token included."""
    if segment_ids is None:
        return valid.shape[0]
    if num_segments is not None:
        return num_segments
    # Not told: the sequences with an unmasked token, each counted at its first one.
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    run = jnp.cumsum(jnp.pad(starts, ((0, 0), (1, 0))), axis=-1)
    seen = jax.vmap(functools.partial(jax.ops.segment_max, num_segments=run.shape[1]))
    return jnp.maximum(seen(valid.astype(jnp.int32), run), 0).sum()


def aggregate_tokens(
    per_token: Array,
    weight: Array,
    *,
    aggregate: str,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
    normalizer: ArrayLike | None = None,
    max_length: ArrayLike | None = None,
) -> Array:
    """Σ m ℓ over [B, T], divided as `aggregate` says."""
    check_choice("aggregate", aggregate, AGGREGATES)
    if num_segments is not None and segment_ids is None:
        raise ValueError("num_segments counts packed sequences: pass segment_ids")
    if aggregate == "token_mean":
        count = at_least_1(weight.sum()) if normalizer is None else normalizer
        return (weight * per_token).sum() / nonzero(count)
    if normalizer is None:
        normalizer = count_sequences(weight > 0, segment_ids, num_segments)
    if aggregate == "constant":
        if max_length is None:
            raise ValueError("aggregate='constant' needs max_length")
        return (weight * per_token).sum() / (nonzero(normalizer) * max_length)
    if aggregate == "sequence_sum":
        return (weight * per_token).sum() / nonzero(normalizer)
    length = sequence_sums(weight, segment_ids)
    return (weight * per_token / at_least_1(length)).sum() / nonzero(normalizer)


def at_least_1(length: Array) -> Array:
    """n_i = max(Σ m, 1): an empty sequence counts as 0, a fraction is not blown up."""
    return jnp.maximum(length, 1)


def nonzero(count: ArrayLike) -> Array:
    """A batch without sequences divides by 1, and so is 0."""
    return jnp.where(jnp.asarray(count) > 0, count, 1)


def token_mean(x: Array, weight: Array) -> Array:
    return (weight * x).sum() / at_least_1(weight.sum())
