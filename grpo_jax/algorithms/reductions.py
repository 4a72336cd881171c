"""Code that the losses share: reductions over tokens, argument checks and `jit_loss`.

A reduction turns per-token terms ℓ and weights m, [B, T], into one scalar.

Axes: B rows, T tokens. A row is one output o_i, or several with `segment_ids`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from jaxtyping import Array, ArrayLike, Float

    Metrics = dict[str, Float[Array, ""]]
    LossAndMetrics = tuple[Float[Array, ""], Metrics]

P = ParamSpec("P")
R = TypeVar("R")
AGGREGATES = ("sequence_mean", "token_mean", "constant", "sequence_sum")


def jit_loss(
    *static: str, pairs: Mapping[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator like `jax.jit` that keeps the function's signature.

    Args:
      static: names of arguments that are static; all others are traced.
      pairs: maps a coefficient to its optional array, as {"kl_coef": "ref_logps"}. A
        coefficient that is 0, without its array, is passed on as None: once traced, it
        could not be recognised as 0.
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
    """Returns whether a coefficient is known to be 0 (`jit_loss` passes 0 as None)."""
    if coefficient is None:
        return True
    return not isinstance(coefficient, jax.core.Tracer) and bool(coefficient == 0)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError if the value of option `name` is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def check_shapes(
    first: Array, others: Mapping[str, Array | None], name="logps"
) -> None:
    """Raises ValueError if an array is not [B, T] or differs in shape from the first.

    Args:
      first: the array with the reference shape.
      others: the other arrays by name; None is skipped.
      name: the name of the first array, for the message.
    """
    if jnp.ndim(first) != 2:
        raise ValueError(f"{name} has shape {jnp.shape(first)}; [B, T] is needed")
    for other, x in others.items():
        if x is not None and jnp.shape(x) != jnp.shape(first):
            raise ValueError(
                f"{other} has shape {jnp.shape(x)}, {name} {jnp.shape(first)}"
            )


def check_groups(name: str, x: Array, axes: str, group_size: int) -> None:
    """Raises ValueError unless x has axes such as "N T", and N whole groups."""
    shape = jnp.shape(x)
    if len(shape) != len(axes.split()) or group_size < 1 or shape[0] % group_size:
        raise ValueError(
            f"{name} has shape {shape}; [{axes.replace(' ', ', ')}] with N a multiple "
            f"of group_size={group_size} is needed"
        )


def advantages_by_token(advantages: Array, logps: Array) -> Array:
    """Returns advantages in a shape that broadcasts to [B, T].

    Args:
      advantages: [B], one for each sequence, or [B, T].
      logps: [B, T].

    Raises:
      ValueError: they have neither of these shapes of `logps`.
    """
    shape = jnp.shape(advantages)
    if shape not in (logps.shape[:1], logps.shape):
        raise ValueError(
            f"advantages has shape {shape}; [B] or [B, T] of logps' {logps.shape} is "
            "needed"
        )
    return advantages[:, None] if len(shape) == 1 else advantages


def weights_and_cleaner(
    mask: Array, *arrays: Array
) -> tuple[Array, Callable[[Array], Array]]:
    """Returns the mask as weights m, and a function `clean` that zeroes masked values.

    `clean` keeps masked values out of every exponent, product and gradient.

    Args:
      mask: [B, T], 0 where a token does not count; bool, int or float.
      arrays: arrays that determine the dtype: float32, or theirs if it is wider.

    Returns:
      m, [B, T], and `clean`: x → x where m is not 0, else 0, in the same dtype.
    """
    mask = jnp.asarray(mask)
    dtype = jnp.result_type(jnp.float32, *(jnp.asarray(x).dtype for x in arrays))
    valid = mask != 0

    def clean(x: Array) -> Array:
        return jnp.where(valid, jnp.asarray(x).astype(dtype), 0)

    return clean(mask), clean


def sequence_sums(x: Array, segment_ids: Array | None) -> Array:
    """Returns, at each token, the sum of x over the token's sequence, [B, T].

    Args:
      x: [B, T].
      segment_ids: the sequence of each token, [B, T]; None: one sequence a row.
    """
    if segment_ids is None:
        return jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape)
    run = _number_sequences(segment_ids)
    sums = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=x.shape[1]))
    return jnp.take_along_axis(sums(x, run), run, axis=-1)


def _number_sequences(segment_ids: Array) -> Array:
    """Numbers each row's sequences 0, 1, 2, … in their order, [B, T]."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(starts, ((0, 0), (1, 0))), axis=-1)


def count_sequences(
    valid: Array, segment_ids: Array | None, num_segments: int | None
) -> Array | int:
    """Returns how many sequences the rows hold.

    Args:
      valid: True where a token counts, [B, T].
      segment_ids: which sequence a token belongs to, [B, T]; None: one a row.
      num_segments: the number of sequences in packed rows; None: only sequences with an
        unmasked token are counted.
    """
    if segment_ids is None:
        return valid.shape[0]
    if num_segments is not None:
        return num_segments
    # A run counts if any of its tokens is unmasked.
    run = _number_sequences(segment_ids)
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
    """Returns Σ m ℓ over [B, T], divided by what `aggregate` selects.

    Args:
      per_token: ℓ, [B, T].
      weight: m, [B, T].
      aggregate: "sequence_mean": each sequence by its length, then by the number of
        sequences; "token_mean": by Σ m; "constant": by sequences × max_length;
        "sequence_sum": by the number of sequences.
      segment_ids, num_segments: as in `count_sequences`.
      normalizer: replaces the number of sequences (token_mean: Σ m), if this call holds
        a part of a batch.
      max_length: the divisor of "constant", in tokens.

    Raises:
      ValueError: an unknown aggregate, num_segments without segment_ids, or "constant"
        without max_length.
    """
    check_choice("aggregate", aggregate, AGGREGATES)
    if num_segments is not None and segment_ids is None:
        raise ValueError("num_segments counts packed sequences: pass segment_ids")
    terms = weight * per_token
    if normalizer is None and aggregate == "token_mean":
        normalizer = at_least_1(weight.sum())
    elif normalizer is None:
        normalizer = count_sequences(weight > 0, segment_ids, num_segments)
    divisor = nonzero_divisor(normalizer)
    if aggregate == "constant":
        if max_length is None:
            raise ValueError("aggregate='constant' needs max_length")
        divisor = divisor * max_length
    if aggregate == "sequence_mean":
        terms = terms / at_least_1(sequence_sums(weight, segment_ids))
    return terms.sum() / divisor


def at_least_1(length: ArrayLike) -> Array:
    """Returns max(length, 1), a safe divisor.

    An empty sequence then has mean 0, and a length below 1 does not scale terms up.

    Args:
      length: of any shape.
    """
    return jnp.maximum(length, 1)


def nonzero_divisor(count: ArrayLike) -> Array:
    """Returns the count, or 1 where it is 0, so that an empty batch's loss is 0.

    Args:
      count: of any shape.
    """
    return jnp.where(jnp.asarray(count) > 0, count, 1)


def token_mean(x: ArrayLike, weight: Array) -> Array:
    """Returns the weighted mean Σ m x / max(Σ m, 1) over all tokens.

    Args:
      x: a value for each token, or one for all.
      weight: m, [B, T].
    """
    return (weight * x).sum() / at_least_1(weight.sum())
