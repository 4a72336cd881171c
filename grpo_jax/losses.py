"""The objectives: arrays of log-probabilities in, (loss, metrics) out.

In: log-probabilities of the completion tokens under π_θ, π_old and π_ref, the
advantages Â and a mask. Out: a scalar loss to minimise and a dict of scalar metrics.
No model, no config, no mesh: every function is pure and needs jax alone, and may be
called under jit, vmap, grad, shard_map and pmap.

Axes: B rows, T tokens. A row is one output o_i, or, with `segment_ids`, several.
What is masked out may hold anything, NaN and infinities included.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Int, Num

# Above e^20 an exponential goes on along its tangent: one token that the policy has
# all but given up must not make the loss, or Adam's second moment, infinite.
_MAX_EXPONENT = 20.0

_CHOICES = {
    "kl_estimator": ("k1", "k2", "k3", "k3_unbiased"),
    "aggregate": ("sequence_mean", "token_mean", "constant"),
    "importance": ("token", "sequence"),
    "surrogate": ("clip", "cispo"),
}


def _check(name: str, value: str) -> None:
    if value not in _CHOICES[name]:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(_CHOICES[name])}")


def _check_shapes(logps: Array, others: dict[str, Array | None]) -> None:
    if logps.ndim != 2:
        raise ValueError(f"logps has shape {logps.shape}; [B, T] is needed")
    for name, x in others.items():
        if x is not None and jnp.shape(x) != logps.shape:
            raise ValueError(f"{name} has shape {jnp.shape(x)}, logps {logps.shape}")


def _exp(x: Array) -> Array:
    """exp(x), continued by its tangent above `_MAX_EXPONENT`: finite and monotonic."""
    excess = jnp.maximum(x - _MAX_EXPONENT, 0.0)
    return jnp.exp(jnp.minimum(x, _MAX_EXPONENT)) * (1.0 + excess)


def _k3(x: Array) -> Array:
    """exp(x) - x - 1, never negative: near 0 exp(x) - 1 would be rounding alone."""
    excess = jnp.maximum(x - _MAX_EXPONENT, 0.0)
    small = jnp.minimum(x, _MAX_EXPONENT)
    return jnp.expm1(small) - small + excess * (jnp.exp(_MAX_EXPONENT) - 1.0)


def _sequence_sums(x: Array, segment_ids: Array | None) -> Array:
    """[B, T] -> [B, T]: at each token, the sum of x over the token's own sequence."""
    if segment_ids is None:
        return jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    run = jnp.cumsum(jnp.pad(starts, ((0, 0), (1, 0))), axis=-1)  # the run's number
    sums = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=x.shape[1]))
    return jnp.take_along_axis(sums(x, run), run, axis=-1)


def _count_sequences(
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


def _aggregate(
    per_token: Array,
    weight: Array,
    *,
    aggregate: str,
    segment_ids: Array | None,
    num_segments: int | None,
    normalizer: ArrayLike | None,
    max_length: ArrayLike | None,
) -> Array:
    """Σ m ℓ over [B, T], divided as `aggregate` says."""
    if aggregate == "token_mean":
        count = _at_least_1(weight.sum()) if normalizer is None else normalizer
        return (weight * per_token).sum() / _nonzero(count)
    if normalizer is None:
        normalizer = _count_sequences(weight > 0, segment_ids, num_segments)
    if aggregate == "constant":
        assert max_length is not None  # the caller has checked
        return (weight * per_token).sum() / (_nonzero(normalizer) * max_length)
    length = _sequence_sums(weight, segment_ids)
    return (weight * per_token / _at_least_1(length)).sum() / _nonzero(normalizer)


def _at_least_1(length: Array) -> Array:
    """n_i = max(Σ m, 1): an empty sequence counts as 0, a fraction is not blown up."""
    return jnp.maximum(length, 1)


def _nonzero(count: ArrayLike) -> Array:
    """A batch without sequences divides by 1, and so is 0."""
    return jnp.where(jnp.asarray(count) > 0, count, 1)


def _token_mean(x: Array, weight: Array) -> Array:
    return (weight * x).sum() / _at_least_1(weight.sum())


def grpo_loss(
    logps: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Num[Array, "B T"],
    *,
    old_logps: Float[Array, "B T"] | None = None,
    ref_logps: Float[Array, "B T"] | None = None,
    weights: Float[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    num_segments: int | None = None,
    normalizer: ArrayLike | None = None,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike | None = None,
    delta: ArrayLike | None = None,
    kl_coef: ArrayLike = 0.04,
    kl_estimator: str = "k3",
    aggregate: str = "sequence_mean",
    max_length: ArrayLike | None = None,
    importance: str = "token",
    surrogate: str = "clip",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """GRPO's objective (DeepSeekMath, section 4.1, equations 3 and 4), to be minimised.

        loss = - mean_i 1/|o_i| Σ_t { min[ρ_it Â_it, clip(ρ_it, 1-ε_low, 1+ε_high) Â_it]
                                      - β (π_ref/π_θ - log(π_ref/π_θ) - 1) }
        ρ_it = π_θ(o_it) / π_old(o_it)

    Args:
      logps: log π_θ of the tokens, [B, T], in nats.
      advantages: Â, [B] (one for each row) or [B, T].
      mask: 1 where a token counts, [B, T]; bool, int or float.
      old_logps: log π_old; None: the policy sampled them itself, ρ = 1.
      ref_logps: log π_ref; needed unless kl_coef is 0.
      weights: truncated importance weights between sampler and trainer, [B, T]; a
        constant factor on the policy term.
      segment_ids: for packed rows, which sequence a token belongs to, [B, T]; the
        tokens of a sequence stand side by side in one row.
      num_segments: how many sequences the packed rows hold (None: those with an
        unmasked token).
      normalizer: the count of sequences (token_mean: of tokens) of the whole batch
        when this call holds a part of it; the parts' losses then sum to the whole's.
      clip_low, clip_high: ε_low and ε_high (None: ε_low). With surrogate="cispo",
        clip_high is the bound on ρ itself and is required.
      delta: the bound on ρ where Â < 0 (two-sided clip).
      kl_coef: β.
      kl_estimator: k3 (the paper's), k1, k2, or k3_unbiased (ρ k3).
      aggregate: sequence_mean (the paper), token_mean (DAPO), or constant (Dr. GRPO:
        divides by rows × max_length).
      importance: "token", or "sequence" for GSPO's ρ_i = exp(mean_t log ρ_it).
      surrogate: "clip", or "cispo": -stop_gradient(min(ρ, clip_high)) Â log π_θ.

    Returns:
      The loss, and the metrics policy_loss, kl, clip_ratio/{low,high,region}_mean and
      num_tokens. At float32 at least, whatever came in.

    Raises:
      ValueError: a shape, or a missing or unknown option.

    >>> logps = jnp.log(jnp.array([[0.5, 0.5], [0.25, 1.0]]))
    >>> mask = jnp.array([[1, 1], [1, 0]])
    >>> loss, metrics = grpo_loss(logps, jnp.array([1.0, -1.0]), mask, kl_coef=0.0)
    >>> float(loss)  # at ρ = 1: minus the mean advantage
    0.0
    """
    _check("kl_estimator", kl_estimator)
    _check("aggregate", aggregate)
    _check("importance", importance)
    _check("surrogate", surrogate)
    arrays = dict(mask=mask, old_logps=old_logps, ref_logps=ref_logps, weights=weights)
    _check_shapes(logps, {**arrays, "segment_ids": segment_ids})
    if jnp.shape(advantages) not in (logps.shape[:1], logps.shape):
        raise ValueError(
            f"advantages has shape {jnp.shape(advantages)}; [B] or [B, T] of logps' "
            f"{logps.shape} is needed"
        )
    if num_segments is not None and segment_ids is None:
        raise ValueError("num_segments counts packed sequences: pass segment_ids")
    if segment_ids is not None and jnp.ndim(advantages) == 1:
        raise ValueError("packed rows (segment_ids) need advantages of shape [B, T]")
    no_kl = not isinstance(kl_coef, jax.core.Tracer) and kl_coef == 0
    if ref_logps is None and not no_kl:
        raise ValueError("ref_logps is None: pass log π_ref, or kl_coef=0.0")
    if aggregate == "constant" and max_length is None:
        raise ValueError("aggregate='constant' needs max_length")
    if surrogate == "cispo" and clip_high is None:
        raise ValueError("surrogate='cispo' needs clip_high, the bound on the ratio")
    return _grpo_loss(
        logps,
        advantages,
        mask,
        old_logps,
        ref_logps,
        weights,
        segment_ids,
        normalizer,
        clip_low,
        clip_low if clip_high is None else clip_high,
        delta,
        kl_coef,
        max_length,
        num_segments=num_segments,
        kl_estimator=kl_estimator,
        aggregate=aggregate,
        importance=importance,
        surrogate=surrogate,
    )


_STATIC = ("num_segments", "kl_estimator", "aggregate", "importance", "surrogate")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _grpo_loss(
    logps,
    advantages,
    mask,
    old_logps,
    ref_logps,
    weights,
    segment_ids,
    normalizer,
    clip_low,
    clip_high,
    delta,
    kl_coef,
    max_length,
    *,
    num_segments,
    kl_estimator,
    aggregate,
    importance,
    surrogate,
):
    dtype = jnp.promote_types(logps.dtype, jnp.float32)
    valid = mask != 0
    m = jnp.where(valid, mask, 0).astype(dtype)

    def clean(x):  # nothing masked reaches an exponent, nor its gradient
        return jnp.where(valid, x.astype(dtype), 0)

    advantages = jnp.asarray(advantages)
    a = clean(advantages[:, None] if advantages.ndim == 1 else advantages)
    logps = clean(logps)
    old = jax.lax.stop_gradient(logps if old_logps is None else clean(old_logps))

    log_ratio = logps - old
    if importance == "sequence":
        length = _at_least_1(_sequence_sums(m, segment_ids))
        log_ratio = _sequence_sums(m * log_ratio, segment_ids) / length
    ratio = _exp(log_ratio)  # ρ

    if surrogate == "cispo":
        policy = -jax.lax.stop_gradient(jnp.minimum(ratio, clip_high)) * a * logps
        low = jnp.zeros_like(ratio, bool)
        high = (ratio > clip_high) & (a > 0)
    else:
        clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
        unclipped = ratio if delta is None else jnp.minimum(ratio, delta)
        policy = -jnp.minimum(unclipped * a, clipped * a)
        low = (ratio < 1 - clip_low) & (a < 0)
        high = (ratio > 1 + clip_high) & (a > 0)
    if weights is not None:
        policy = policy * jax.lax.stop_gradient(clean(weights))

    divide = functools.partial(
        _aggregate,
        weight=m,
        aggregate=aggregate,
        segment_ids=segment_ids,
        num_segments=num_segments,
        normalizer=normalizer,
        max_length=max_length,
    )
    loss = policy_loss = divide(policy)
    metrics = {"policy_loss": policy_loss}
    if ref_logps is not None:
        difference = jax.lax.stop_gradient(clean(ref_logps)) - logps  # log π_ref/π_θ
        if kl_estimator == "k1":
            kl = -difference
        elif kl_estimator == "k2":
            kl = jnp.square(difference) / 2
        else:
            kl = _k3(difference)
        if kl_estimator == "k3_unbiased":
            kl = ratio * kl
        loss = policy_loss + kl_coef * divide(kl)
        metrics["kl"] = _token_mean(kl, m)
    metrics |= {
        "clip_ratio/low_mean": _token_mean(low.astype(dtype), m),
        "clip_ratio/high_mean": _token_mean(high.astype(dtype), m),
        "clip_ratio/region_mean": _token_mean((low | high).astype(dtype), m),
        "num_tokens": m.sum(),
    }
    return loss, jax.lax.stop_gradient(metrics)


def sft_loss(
    logps: Float[Array, "B T"],
    mask: Num[Array, "B T"],
    *,
    weights: Float[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    num_segments: int | None = None,
    normalizer: ArrayLike | None = None,
    aggregate: str = "sequence_mean",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Supervised fine-tuning (section 5.2, appendix A.1.1): GC = 1 for every token.

        loss = - mean_i 1/|o_i| Σ_t log π_θ(o_it)

    Shapes and options as in `grpo_loss`; `weights` multiply the tokens' terms.

    >>> logps = jnp.log(jnp.array([[0.5, 0.25]]))
    >>> loss, _ = sft_loss(logps, jnp.array([[1, 0]]))
    >>> round(float(loss), 4)
    0.6931
    """
    _check("aggregate", aggregate)
    if aggregate == "constant":
        raise ValueError("sft_loss has no aggregate='constant'")
    arrays = dict(mask=mask, weights=weights, segment_ids=segment_ids)
    _check_shapes(logps, arrays)
    logps, mask = jnp.asarray(logps), jnp.asarray(mask)
    dtype = jnp.promote_types(logps.dtype, jnp.float32)
    valid = mask != 0
    m = jnp.where(valid, mask, 0).astype(dtype)
    nll = -jnp.where(valid, logps.astype(dtype), 0)
    if weights is not None:
        nll = nll * jnp.where(valid, jnp.asarray(weights, dtype), 0)
    loss = _aggregate(
        nll,
        m,
        aggregate=aggregate,
        segment_ids=segment_ids,
        num_segments=num_segments,
        normalizer=normalizer,
        max_length=None,
    )
    metrics = {"nll": _token_mean(nll, m), "num_tokens": m.sum()}
    return loss, jax.lax.stop_gradient(metrics)
