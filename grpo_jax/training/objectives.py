"""Objectives: a model applied to packed rows, followed by one of the losses.

`apply(params, tokens, *, positions, segment_ids)` may be any pure function that returns
logits [B, T, V] or the pair (hidden [B, T, D], unembed [D, V]). `train_step.py`
compiles an `Objective` into a step.

Axes: B rows, T positions of a micro-batch; S sequences that a row can hold; D width;
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.algorithms.policy_losses import grpo_loss, sft_loss, value_loss
from grpo_jax.algorithms.preference_losses import dpo_loss
from grpo_jax.models import lora
from grpo_jax.models.logprobs import logprobs_from_logits, token_logprobs
from grpo_jax.training.batch import Batch
from grpo_jax.training.packing import PROMPT

Array = jax.Array
Apply = Callable[..., Any]
Metrics = dict[str, Array]
# (params, reference, micro-batch, sequences and tokens of the whole batch)
Objective = Callable[[Any, Any, Batch, Array, Array], tuple[Array, Metrics]]


def apply_to(apply: Apply, params: Any, micro: Batch) -> Any:
    """Returns what a model gives for the tokens of a micro-batch."""
    return apply(
        params, micro.tokens, positions=micro.positions, segment_ids=micro.segment_ids
    )


def batch_logprobs(
    apply: Apply, params: Any, micro: Batch, temperature: float
) -> tuple[Array, Array]:
    """Returns the targets' log-probabilities and the policy's entropy.

    Args:
      apply: the model (see the top of the file).
      params: its parameters.
      micro: a micro-batch, [B, T].
      temperature: of sampling; logits are divided by it.

    Returns:
      (log π(target), entropy), float32 [B, T], in nats.
    """
    out = apply_to(apply, params, micro)
    if isinstance(out, tuple):
        hidden, unembed = out
        return token_logprobs(hidden, unembed, micro.targets, temperature=temperature)
    return logprobs_from_logits(out, micro.targets, temperature=temperature)


def grpo_objective(
    apply: Apply,
    *,
    temperature: float = 1.0,
    kl_coef: float = 0.04,
    entropy_coef: float = 0.0,
    importance_cap: float | None = None,
    **options: Any,
) -> Objective:
    """Returns GRPO's objective over packed rows (section 4.1, equation 3).

    Args:
      apply: the model (see the top of the file).
      temperature: of sampling; logits are divided by it.
      kl_coef: β; 0 needs no π_ref.
      entropy_coef: coefficient of an entropy bonus.
      importance_cap: C of the weights min(π_old/π_sampler, C); None leaves them out.
      **options: further options of `grpo_loss`.
    """

    def objective(params, reference, micro, sequences, tokens):
        logps, entropy = batch_logprobs(apply, params, micro, temperature)
        ref_logps = micro.ref_logps
        if ref_logps is None and kl_coef:
            frozen = lora.base_params(params) if reference is None else reference
            ref_logps, _ = batch_logprobs(apply, frozen, micro, temperature)
        loss, metrics = grpo_loss(
            logps,
            micro.advantages,
            micro.mask,
            old_logps=micro.old_logps,
            ref_logps=ref_logps,
            sampler_logps=micro.sampler_logps if importance_cap else None,
            importance_cap=importance_cap,
            entropy=entropy if entropy_coef else None,
            entropy_coef=entropy_coef,
            segment_ids=micro.segment_ids,
            normalizer=_normalizer(options.get("aggregate"), sequences, tokens),
            kl_coef=kl_coef,
            **options,
        )
        return loss, metrics | _policy_metrics(logps, entropy, micro)

    return objective


def sft_objective(
    apply: Apply, *, temperature: float = 1.0, aggregate: str = "sequence_mean"
) -> Objective:
    """Returns the objective of supervised fine-tuning over packed rows.

    Rejection-sampling fine-tuning uses it too, with I(o) as the batch's advantages.
    """

    def objective(params, reference, micro, sequences, tokens):
        logps, entropy = batch_logprobs(apply, params, micro, temperature)
        loss, metrics = sft_loss(
            logps,
            micro.mask,
            weights=micro.advantages,
            segment_ids=micro.segment_ids,
            normalizer=_normalizer(aggregate, sequences, tokens),
            aggregate=aggregate,
        )
        return loss, metrics | _policy_metrics(logps, entropy, micro)

    return objective


def dpo_objective(
    apply: Apply, *, temperature: float, beta: float, length_normalized: bool
) -> Objective:
    """Returns DPO's objective over packed rows (appendix A.1.4, equation 12).

    Segments 1 and 2, 3 and 4, … of a row are pairs (o⁺, o⁻). π_ref sampled the outputs,
    so the batch's sampler log-probabilities are log π_ref.

    Args:
      apply: the model (see the top of the file).
      temperature: of sampling; logits are divided by it.
      beta: β.
      length_normalized: take Δ of means over tokens, as the paper does, not of sums.
    """

    def objective(params, reference, micro, sequences, tokens):
        logps, entropy = batch_logprobs(apply, params, micro, temperature)

        def per_sequence(x):  # [B, T] -> o⁺ and o⁻, [B·S/2, 1] each
            x = jnp.where(micro.mask, x, 0)
            # Segment 0 is padding; an even number of segments after it makes pairs.
            size = x.shape[1] + 1 + x.shape[1] % 2
            add = jax.vmap(lambda v, s: jnp.zeros(size, v.dtype).at[s].add(v))
            sums = add(x, micro.segment_ids % PROMPT)[:, 1:].reshape(-1, 2)
            return sums[:, :1], sums[:, 1:]

        lengths = per_sequence(jnp.ones_like(logps))
        divisors = [jnp.maximum(n, 1) if length_normalized else 1 for n in lengths]
        sums = *per_sequence(logps), *per_sequence(micro.sampler_logps)
        pairs = sequences / 2
        loss, metrics = dpo_loss(
            *(s / n for s, n in zip(sums, divisors * 2, strict=True)),
            *(n > 0 for n in lengths),
            beta=beta,
            normalizer=pairs,
        )
        here = ((lengths[0] > 0) & (lengths[1] > 0)).sum() / jnp.maximum(pairs, 1)
        metrics = {name: value * here for name, value in metrics.items()}
        metrics["num_tokens"] = micro.mask.sum().astype(jnp.float32)
        metrics["entropy"] = _mean(jax.lax.stop_gradient(entropy), micro.mask)
        return loss, metrics

    return objective


def ppo_objective(
    apply: Apply, critic: Apply, *, value_clip: float | None, **options: Any
) -> Objective:
    """Returns PPO's objective over packed rows: clipped surrogate plus value loss.

    The KL term is part of the reward (section 4.1.1), and so of the advantages.

    Args:
      apply: the model (see the top of the file).
      critic: called as `apply` with params["value"]; returns V(s_t), [B, T].
      value_clip: bound on the change of V in an update; None leaves it out.
      **options: those of `grpo_objective`, without `kl_coef`.
    """
    policy = grpo_objective(apply, kl_coef=0.0, **options)

    def objective(params, reference, micro, sequences, tokens):
        loss, metrics = policy(params, reference, micro, sequences, tokens)
        regression = value_loss(
            apply_to(critic, params["value"], micro),
            micro.old_values,
            micro.returns,
            micro.mask,
            clip=value_clip,
            normalizer=tokens,
        )
        metrics["value_loss"] = jax.lax.stop_gradient(regression)
        return loss + regression, metrics

    return objective


def _normalizer(aggregate: str | None, sequences: Array, tokens: Array) -> Array:
    return tokens if aggregate == "token_mean" else sequences


def _policy_metrics(logps: Array, entropy: Array, micro: Batch) -> Metrics:
    """Returns entropy and the gap between trainer and sampler, in nats."""
    m = micro.mask
    metrics = {"entropy": _mean(entropy, m)}
    if micro.sampler_logps is not None:
        gap = jnp.abs(jnp.where(m, logps - micro.sampler_logps, 0))
        metrics["sampling/sampling_logp_difference/mean"] = _mean(gap, m)
        metrics["sampling/sampling_logp_difference/max"] = gap.max()
    return jax.lax.stop_gradient(metrics)


def _mean(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)
