"""Losses of GRPO, PPO and supervised fine-tuning, on arrays of log-probabilities.

GRPO is DeepSeekMath's section 4.1, supervised fine-tuning section 5.2. Functions return
a scalar loss to minimise, most with a dict of scalar metrics. They are pure, need only
jax, and work under jit, vmap, grad, shard_map and pmap.

Axes: B rows, T tokens. A row is one output o_i, or several with `segment_ids`. Masked
positions may hold any value, NaN and infinities included.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from grpo_jax.algorithms.reductions import (
    advantages_by_token,
    aggregate_tokens,
    at_least_1,
    check_choice,
    check_shapes,
    is_off,
    jit_loss,
    sequence_sums,
    token_mean,
    weights_and_cleaner,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Int, Num

    from grpo_jax.algorithms.reductions import LossAndMetrics

# Above this exponent, exp continues along its tangent. Otherwise one token that became
# very unlikely could make the loss, or Adam's second moment, infinite.
_MAX_EXPONENT = 20.0

KL_ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased")
IMPORTANCE = ("token", "sequence")
SURROGATES = ("clip", "cispo")


def _exp(x: Array) -> Array:
    """Returns exp(x), continued by its tangent above `_MAX_EXPONENT`."""
    excess = jnp.maximum(x - _MAX_EXPONENT, 0.0)
    return jnp.exp(jnp.minimum(x, _MAX_EXPONENT)) * (1.0 + excess)


def _k3(x: Array) -> Array:
    """Returns exp(x) - x - 1; expm1 keeps its digits, and its sign, near 0."""
    excess = jnp.maximum(x - _MAX_EXPONENT, 0.0)
    small = jnp.minimum(x, _MAX_EXPONENT)
    return jnp.expm1(small) - small + excess * (jnp.exp(_MAX_EXPONENT) - 1.0)


@jit_loss(
    *("num_segments", "kl_estimator", "aggregate", "importance", "surrogate"),
    pairs={"kl_coef": "ref_logps", "entropy_coef": "entropy"},
)
def grpo_loss(
    logps: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Num[Array, "B T"],
    *,
    old_logps: Float[Array, "B T"] | None = None,
    ref_logps: Float[Array, "B T"] | None = None,
    weights: Float[Array, "B T"] | None = None,
    sampler_logps: Float[Array, "B T"] | None = None,
    importance_cap: ArrayLike | None = None,
    entropy: Float[Array, "B T"] | None = None,
    entropy_coef: ArrayLike = 0.0,
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
) -> LossAndMetrics:
    """Returns the GRPO loss (DeepSeekMath, section 4.1, equations 3 and 4).

        loss = - mean_i 1/|o_i| Σ_t { min[ρ_it Â_it, clip(ρ_it, 1-ε_low, 1+ε_high) Â_it]
                                      - β (π_ref/π_θ - log(π_ref/π_θ) - 1) }
        ρ_it = π_θ(o_it) / π_old(o_it)

    Args:
      logps: log π_θ of the tokens, [B, T], in nats.
      advantages: Â, [B] (one for each row) or [B, T].
      mask: 1 where a token counts, [B, T]; bool, int or float.
      old_logps: log π_old, [B, T]; None: π_old = π_θ, so ρ = 1.
      ref_logps: log π_ref, [B, T]; needed unless kl_coef is 0.
      weights: a constant factor on the policy term, [B, T].
      sampler_logps: log-probabilities as the sampler computed them, [B, T], for
        truncated importance sampling between sampler and trainer (Yao et al. 2025): the
        policy term gets the constant factor min(exp(log π_old - sampler_logps), C).
      importance_cap: C; needed with sampler_logps, and only then.
      entropy: the policy's entropy H at each token, [B, T], in nats; needed unless
        entropy_coef is 0.
      entropy_coef: c of the entropy bonus -c H (Mnih et al. 2016), which is aggregated
        like the policy term.
      segment_ids: for packed rows, which sequence a token belongs to, [B, T]; the
        tokens of a sequence are contiguous in one row.
      num_segments: how many sequences the packed rows hold; None: those with an
        unmasked token.
      normalizer: the number of sequences (token_mean: of tokens) in the whole batch, if
        this call holds a part of it. The losses of the parts then sum to the whole's.
      clip_low, clip_high: ε_low and ε_high (None: ε_low). With surrogate="cispo",
        clip_high is the bound on ρ itself and is required.
      delta: the bound on ρ where Â < 0 (two-sided clip); None: no bound.
      kl_coef: β.
      kl_estimator: "k3" (the paper), "k1", "k2", or "k3_unbiased" (ρ k3).
      aggregate: "sequence_mean" (the paper), "token_mean" (DAPO), "constant" (Dr. GRPO:
        divides by rows × max_length), or "sequence_sum" (RLOO: divides by rows).
      max_length: the divisor of aggregate="constant", in tokens.
      importance: "token", or "sequence" for GSPO's ρ_i = exp(mean_t log ρ_it).
      surrogate: "clip", or "cispo": -stop_gradient(min(ρ, clip_high)) Â log π_θ.

    Returns:
      The loss, and the metrics policy_loss, clip_ratio/{low,high,region}_mean and
      num_tokens; also kl, entropy and sampling/importance_sampling_ratio/{min,mean,max}
      if their arrays are given. All are scalars of float32 or a wider input's dtype.

    Raises:
      ValueError: a wrong shape, or a missing or unknown option.

    >>> logps = jnp.log(jnp.array([[0.5, 0.5], [0.25, 1.0]]))
    >>> mask = jnp.array([[1, 1], [1, 0]])
    >>> loss, metrics = grpo_loss(logps, jnp.array([1.0, -1.0]), mask, kl_coef=0.0)
    >>> float(loss)  # at ρ = 1: minus the mean advantage
    0.0
    """
    check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check_choice("importance", importance, IMPORTANCE)
    check_choice("surrogate", surrogate, SURROGATES)
    arrays = dict(mask=mask, old_logps=old_logps, ref_logps=ref_logps, weights=weights)
    arrays |= dict(sampler_logps=sampler_logps, entropy=entropy)
    check_shapes(logps, {**arrays, "segment_ids": segment_ids})
    a = advantages_by_token(advantages, logps)
    if segment_ids is not None and jnp.ndim(advantages) == 1:
        raise ValueError("packed rows (segment_ids) need advantages of shape [B, T]")
    if ref_logps is None and not is_off(kl_coef):
        raise ValueError("ref_logps is None: pass log π_ref, or kl_coef=0.0")
    if entropy is None and not is_off(entropy_coef):
        raise ValueError("entropy is None: pass [B, T], or entropy_coef=0.0")
    if (sampler_logps is None) != (importance_cap is None):
        raise ValueError("sampler_logps and importance_cap are needed together")
    if surrogate == "cispo" and clip_high is None:
        raise ValueError("surrogate='cispo' needs clip_high, the bound on the ratio")
    clip_high = clip_low if clip_high is None else clip_high

    m, clean = weights_and_cleaner(mask, logps)
    a, logps = clean(a), clean(logps)
    old = jax.lax.stop_gradient(logps if old_logps is None else clean(old_logps))

    log_ratio = logps - old
    if importance == "sequence":
        length = at_least_1(sequence_sums(m, segment_ids))
        log_ratio = sequence_sums(m * log_ratio, segment_ids) / length
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
    metrics = {}
    if sampler_logps is not None and importance_cap is not None:
        w = jax.lax.stop_gradient(_exp(old - clean(sampler_logps)))
        w = jnp.minimum(w, importance_cap)
        policy = policy * w
        name, valid = "sampling/importance_sampling_ratio", m > 0
        lowest = jnp.where(valid, w, jnp.inf).min()
        metrics = {
            f"{name}/min": jnp.where(valid.any(), lowest, 0),
            f"{name}/mean": token_mean(w, m),
            f"{name}/max": jnp.where(valid, w, 0).max(),
        }

    divide = functools.partial(
        aggregate_tokens,
        weight=m,
        aggregate=aggregate,
        segment_ids=segment_ids,
        num_segments=num_segments,
        normalizer=normalizer,
        max_length=max_length,
    )
    loss = metrics["policy_loss"] = divide(policy)
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
        loss = loss + kl_coef * divide(kl)
        metrics["kl"] = token_mean(kl, m)
    if entropy is not None:
        h = clean(entropy)
        loss = loss - entropy_coef * divide(h)
        metrics["entropy"] = token_mean(h, m)
    for name, clipped in {"low": low, "high": high, "region": low | high}.items():
        metrics[f"clip_ratio/{name}_mean"] = token_mean(clipped.astype(m.dtype), m)
    metrics["num_tokens"] = m.sum()
    return loss, jax.lax.stop_gradient(metrics)


def ppo_loss(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"] | None,
    advantages: Float[Array, "B T"],
    mask: Num[Array, "B T"],
    **options: Any,
) -> LossAndMetrics:
    """Returns PPO's clipped loss (Schulman et al. 2017; DeepSeekMath, section 4.1.1).

        loss = - mean_i 1/|o_i| Σ_t min[ρ_it A_it, clip(ρ_it, 1-ε_low, 1+ε_high) A_it]

    This is `grpo_loss` without its KL term, which PPO puts in the reward. A comes from
    `gae`, and the value function has its own `value_loss`. TRL and verl average over
    all tokens instead: aggregate="token_mean".

    Args:
      logps: log π_θ of the tokens, [B, T], in nats.
      old_logps: log π_old, [B, T]; None: π_old = π_θ.
      advantages: A, [B, T].
      mask: 1 where a token counts, [B, T].
      options: options of `grpo_loss`, such as clip_low, aggregate and segment_ids.

    Returns:
      The loss and metrics, as `grpo_loss` does.

    Raises:
      ValueError: as `grpo_loss` does.

    >>> old = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> new = jnp.log(jnp.array([[0.7, 0.4]]))  # ρ = 1.4, held at 1.2, and 0.8
    >>> loss, _ = ppo_loss(new, old, jnp.ones((1, 2)), jnp.ones((1, 2)))
    >>> round(float(loss), 4)
    -1.0
    """
    return grpo_loss(
        logps, advantages, mask, old_logps=old_logps, kl_coef=0.0, **options
    )


@jit_loss("num_segments", "aggregate")
def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"] | None,
    returns: Float[Array, "B T"],
    mask: Num[Array, "B T"],
    *,
    clip: ArrayLike | None = 0.2,
    segment_ids: Int[Array, "B T"] | None = None,
    num_segments: int | None = None,
    normalizer: ArrayLike | None = None,
    aggregate: str = "token_mean",
) -> Float[Array, ""]:
    """Returns PPO's clipped value loss, as in TRL and verl.

        loss = mean_t 1/2 max[(V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2]

    Args:
      values: V of the value function that is trained, [B, T].
      old_values: V_old at sampling time, [B, T]; may be None if clip is None. No
        gradient flows into it.
      returns: R, [B, T], as `gae` returns them. No gradient flows into them.
      mask: 1 where a token counts, [B, T].
      clip: c; None: the plain squared error.
      segment_ids, num_segments, normalizer: as in `grpo_loss`.
      aggregate: "token_mean" or "sequence_mean".

    Raises:
      ValueError: a wrong shape, an unknown aggregate, or a clip without old_values.

    >>> values, old = jnp.array([[1.0, 0.5]]), jnp.zeros((1, 2))
    >>> float(value_loss(values, old, jnp.ones((1, 2)), jnp.ones((1, 2)), clip=0.5))
    0.125
    """
    arrays = dict(old_values=old_values, returns=returns, mask=mask)
    check_shapes(values, {**arrays, "segment_ids": segment_ids}, "values")
    check_choice("aggregate", aggregate, ("sequence_mean", "token_mean"))
    m, clean = weights_and_cleaner(mask, values)
    v, target = clean(values), jax.lax.stop_gradient(clean(returns))
    square = jnp.square(v - target)
    if clip is not None:
        if old_values is None:
            raise ValueError("old_values is None: pass them, or clip=None")
        old = jax.lax.stop_gradient(clean(old_values))
        square = jnp.maximum(
            square, jnp.square(jnp.clip(v, old - clip, old + clip) - target)
        )
    return aggregate_tokens(
        square / 2,
        m,
        aggregate=aggregate,
        segment_ids=segment_ids,
        num_segments=num_segments,
        normalizer=normalizer,
    )


@jit_loss("num_segments", "aggregate")
def sft_loss(
    logps: Float[Array, "B T"],
    mask: Num[Array, "B T"],
    *,
    weights: Float[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    num_segments: int | None = None,
    normalizer: ArrayLike | None = None,
    aggregate: str = "sequence_mean",
) -> LossAndMetrics:
    """Returns the supervised fine-tuning loss (DeepSeekMath, appendix A.1.1; GC = 1).

        loss = - mean_i 1/|o_i| Σ_t log π_θ(o_it)

    Args:
      logps: log π_θ of the tokens, [B, T], in nats.
      mask: 1 where a token counts, [B, T].
      weights: a factor on each token's term, [B, T].
      segment_ids, num_segments, normalizer: as in `grpo_loss`.
      aggregate: as in `grpo_loss`, except "constant".

    Returns:
      The loss, and the metrics nll (the mean over tokens) and num_tokens.

    Raises:
      ValueError: a wrong shape or an unknown aggregate.

    >>> logps = jnp.log(jnp.array([[0.5, 0.25]]))
    >>> loss, _ = sft_loss(logps, jnp.array([[1, 0]]))
    >>> round(float(loss), 4)
    0.6931
    """
    if aggregate == "constant":
        raise ValueError("sft_loss has no aggregate='constant'")
    arrays = dict(mask=mask, weights=weights, segment_ids=segment_ids)
    check_shapes(logps, arrays)
    m, clean = weights_and_cleaner(mask, logps)
    nll = -clean(logps)
    if weights is not None:
        nll = nll * clean(weights)
    loss = aggregate_tokens(
        nll,
        m,
        aggregate=aggregate,
        segment_ids=segment_ids,
        num_segments=num_segments,
        normalizer=normalizer,
    )
    metrics = {"nll": token_mean(nll, m), "num_tokens": m.sum()}
    return loss, jax.lax.stop_gradient(metrics)
