"""What is optimised: a model applied to packed rows, and one of the losses.

In: `apply(params, tokens, *, positions, segment_ids)`, any pure function that returns
logits [B, T, V] or the pair (hidden [B, T, D], unembed [D, V]); the loss's options.
Out: an `Objective`, which `update.py` compiles into a step.

Axes: B rows, T positions of a micro-batch; S sequences that a row can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.algorithms.policy_losses import dpo_loss, grpo_loss, sft_loss, value_loss
from grpo_jax.models import lora
from grpo_jax.models.logprobs import logprobs_from_logits, token_logprobs
from grpo_jax.training.packing import PROMPT, Batch

Array = jax.Array
Apply = Callable[..., Any]
Metrics = dict[str, Array]
# (params, reference, micro-batch, sequences and tokens of the whole batch)
Objective = Callable[[Any, Any, Batch, Array, Array], tuple[Array, Metrics]]


def batch_logprobs(
    apply: Apply, params: Any, micro: Batch, temperature: float
) -> tuple[Array, Array]:
    """(log π of the targets, entropy), [B, T], at the sampling temperature."""
    out = apply(
        params,
        micro.tokens,
        positions=micro.positions,
        segment_ids=micro.segment_ids,
    )
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
    """GRPO over packed rows; `options` are those of `losses.grpo_loss`."""

    def objective(params, reference, micro, sequences, tokens):
        logps, entropy = batch_logprobs(apply, params, micro, temperature)
        ref_logps = micro.ref_logps
        if ref_logps is None and kl_coef:
            frozen = lora.base(params) if reference is None else reference
            ref_logps, _ = batch_logprobs(apply, frozen, micro, temperature)
        by_token = options.get("aggregate") == "token_mean"
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
            normalizer=tokens if by_token else sequences,
            kl_coef=kl_coef,
            **options,
        )
        metrics |= _watch(logps, entropy, micro)
        return loss, metrics

    return objective


def sft_objective(
    apply: Apply, *, temperature: float = 1.0, aggregate: str = "sequence_mean"
) -> Objective:
    """Supervised fine-tuning over packed rows; rejection sampling's with I(o) as Â."""

    def objective(params, reference, micro, sequences, tokens):
        logps, entropy = batch_logprobs(apply, params, micro, temperature)
        loss, metrics = sft_loss(
            logps,
            micro.mask,
            weights=micro.advantages,
            segment_ids=micro.segment_ids,
            normalizer=tokens if aggregate == "token_mean" else sequences,
            aggregate=aggregate,
        )
        metrics |= _watch(logps, entropy, micro)
        return loss, metrics

    return objective


def dpo_objective(
    apply: Apply, *, temperature: float, beta: float, length_normalized: bool
) -> Objective:
    """DPO over packed rows: segments 1 and 2, 3 and 4, … are pairs (o⁺, o⁻).

    π_ref sampled the outputs, so its log-probabilities are the sampler's.
    """

    def objective(params, reference, micro, sequences, tokens):
        logps, entropy = batch_logprobs(apply, params, micro, temperature)

        def per_sequence(x):  # [B, T] -> o⁺ and o⁻, [B·S/2, 1] each
            x = jnp.where(micro.mask, x, 0)
            size = x.shape[1] + 1 + x.shape[1] % 2  # of 0, and an even number after it
            add = jax.vmap(lambda v, s: jnp.zeros(size, v.dtype).at[s].add(v))
            sums = add(x, micro.segment_ids % PROMPT)[:, 1:].reshape(-1, 2)
            return sums[:, :1], sums[:, 1:]

        lengths = per_sequence(jnp.ones_like(logps))

        def of_outputs(x):
            sums = per_sequence(x)
            if not length_normalized:
                return sums
            return [s / jnp.maximum(n, 1) for s, n in zip(sums, lengths, strict=True)]

        pairs = sequences / 2
        (chosen, rejected), (ref_chosen, ref_rejected) = (
            of_outputs(x) for x in (logps, micro.sampler_logps)
        )
        loss, metrics = dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            *(n > 0 for n in lengths),
            beta=beta,
            normalizer=pairs,
        )
        here = ((lengths[0] > 0) & (lengths[1] > 0)).sum() / jnp.maximum(pairs, 1)
        metrics = {k: v * here for k, v in metrics.items() if k.startswith("rewards/")}
        metrics["num_tokens"] = micro.mask.sum().astype(jnp.float32)
        metrics["entropy"] = _mean(jax.lax.stop_gradient(entropy), micro.mask)
        return loss, metrics

    return objective


def ppo_objective(
    apply: Apply, critic: Apply, *, value_clip: float | None, **options: Any
) -> Objective:
    """PPO over packed rows: the clipped surrogate, and the critic's regression.

    critic(params["value"], tokens, *, positions, segment_ids) → V(s_t), [B, T]. The KL
    term is part of the reward (appendix A.1.5), so of the advantages.
    """
    policy = grpo_objective(apply, kl_coef=0.0, **options)

    def objective(params, reference, micro, sequences, tokens):
        loss, metrics = policy(params, reference, micro, sequences, tokens)
        values = critic(
            params["value"],
            micro.tokens,
            positions=micro.positions,
            segment_ids=micro.segment_ids,
        )
        regression = value_loss(
            values,
            micro.old_values,
            micro.returns,
            micro.mask,
            clip=value_clip,
            normalizer=tokens,
        )
        metrics["value_loss"] = jax.lax.stop_gradient(regression)
        return loss + regression, metrics

    return objective


def _watch(logps: Array, entropy: Array, micro: Batch) -> Metrics:
    """Entropy, and how far the trainer's log-probabilities are from the sampler's."""
    m = micro.mask
    metrics = {"entropy": _mean(entropy, m)}
    if micro.sampler_logps is not None:
        gap = jnp.abs(jnp.where(m, logps - micro.sampler_logps, 0))
        metrics["sampling/sampling_logp_difference/mean"] = _mean(gap, m)
        metrics["sampling/sampling_logp_difference/max"] = gap.max()
    return jax.lax.stop_gradient(metrics)


def _mean(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)
