"""Credit assignment: from the rewards of a step's outputs to their tokens' advantages.

The result is the samples that `packing` takes. There is one function for each kind of
gradient coefficient in `algorithms/methods.py`:

    indicator   I(o) of RFT and Online RFT
    outcome     Â_i of a group (section 4.1.2)
    process     Â_it from the rewards of steps (section 4.1.3)
    critic      A_t by GAE, with the KL term in the reward (PPO)
    returns     the same without a critic (REINFORCE++)
    pairs       o⁺ beside o⁻ (DPO)

Axes: N outputs, the G of a question side by side; C tokens of the longest output.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithms.advantages import (
    decoupled_advantages,
    gae,
    group_advantages,
    process_advantages,
)
from grpo_jax.data.example import Example
from grpo_jax.generation.rollout_shapes import bucket_length
from grpo_jax.rewards.reward_functions import RewardScores
from grpo_jax.training.batch import Sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """One output o_i of a question, as it was sampled."""

    example: Example
    prompt: list[int]
    tokens: list[int]  # the EOS token included
    logps: list[float]  # under the policy that sampled it
    mask: list[int] | None = None  # 0 if a tool wrote the token; None: all sampled
    text: str = ""  # the decoded tokens; "" until they are decoded
    finished: bool  # ended with EOS, not cut off
    calls: int | None = None  # programs that were run; None: a run without tools
    failures: int = 0  # of these programs

    @property
    def sampled(self) -> list[int]:
        """1 for tokens that the policy sampled, 0 for a tool's."""
        return [1] * len(self.tokens) if self.mask is None else self.mask

    @functools.cached_property
    def sample(self) -> Sample:
        """Prompt and output, with the output's sampled tokens in the loss."""
        return Sample.from_output(
            self.prompt, self.tokens, logps=self.logps, mask=self.sampled
        )


def assign_indicator_credit(
    outputs: Sequence[Output], rewards: np.ndarray
) -> list[Sample]:
    """Returns samples whose advantage is I(o): 1 if the output is right, else 0.

    An output is right if its reward is above 0.

    Args:
      outputs: N outputs.
      rewards: [N].
    """
    samples = with_advantages(outputs, (rewards > 0).astype(float).tolist())
    return [dataclasses.replace(sample, logps=None) for sample in samples]


def assign_outcome_credit(
    outputs: Sequence[Output],
    scores: RewardScores,
    weights: Sequence[float],
    group_size: int,
    *,
    scale: str,
    baseline: str,
    each: bool = False,
) -> list[Sample]:
    """Returns samples with Â_i at every token of o_i (section 4.1.2).

    Args:
      outputs: N outputs, the G of a question side by side.
      scores: their rewards.
      weights: of the reward functions, in the order of `scores.by_function`.
      group_size: G.
      scale, baseline: as in `group_advantages`.
      each: normalise each reward function's values before they are summed with their
        weights (`decoupled_advantages`), instead of normalising the sum.
    """
    options = dict(scale=scale, baseline=baseline)
    if each:
        table = jnp.stack([*map(jnp.asarray, scores.by_function.values())], 1)
        given = table, jnp.asarray(weights)
        advantages = decoupled_advantages(*given, group_size, **options)
    else:
        rewards = jnp.asarray(scores.rewards)
        advantages = group_advantages(rewards, group_size, **options)
    return with_advantages(outputs, np.asarray(advantages).tolist())


def assign_process_credit(
    outputs: Sequence[Output],
    step_ends: Sequence[Sequence[int]],
    step_rewards: Sequence[np.ndarray],
    group_size: int,
) -> list[Sample]:
    """Returns samples with Â_it from rewards of steps (section 4.1.3).

    Â_it is the sum of the normalised rewards of o_i's steps that end at t or later.

    Args:
      outputs: N outputs, the G of a question side by side.
      step_ends: for each output, the index of each step's last token.
      step_rewards: for each output, the reward of each step.
      group_size: G.
    """
    rewards, ends = (zeros_for_outputs(outputs) for _ in range(2))
    for i, (where, values) in enumerate(zip(step_ends, step_rewards, strict=True)):
        rewards[i, list(where)] = values
        ends[i, list(where)] = 1
    advantages = process_advantages(jnp.asarray(rewards), jnp.asarray(ends), group_size)
    rows = zip(outputs, np.asarray(advantages), strict=True)
    return with_advantages(outputs, [pad_prompt(o, row) for o, row in rows])


def assign_critic_credit(
    outputs: Sequence[Output],
    rewards: np.ndarray,
    values: Sequence[np.ndarray],
    ref_logps: Sequence[np.ndarray] | None,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> list[Sample]:
    """Returns samples with PPO's advantages and returns (section 4.1.1).

    A_t is GAE of the token rewards r_t = -β log(π_old/π_ref), to which the output's
    reward is added at its last sampled token. Tokens that a tool wrote are skipped.
    Advantages are normalised to mean 0 and variance 1 over the batch's tokens; returns
    are not. log π_old is the sampler's, even if that lags by a step (max_staleness).

    Args:
      outputs: N outputs.
      rewards: [N]; an output with NaN is left out of the loss.
      values: for each output, V(s_t) at its tokens.
      ref_logps: for each output, log π_ref at its tokens; None leaves out the KL term.
      kl_coef: β.
      gamma: GAE's discount γ.
      lam: GAE's λ.
    """
    r, v, mask = (zeros_for_outputs(outputs) for _ in range(3))
    for i, output in enumerate(outputs):
        n = len(output.tokens)
        v[i, :n] = values[i]
        mask[i, :n] = np.isfinite(rewards[i]) * np.array(output.sampled)
        if ref_logps is not None:
            r[i, :n] = -kl_coef * (np.asarray(output.logps) - ref_logps[i])
        r[i, np.flatnonzero(output.sampled)[-1]] += rewards[i]
    arrays = (jnp.asarray(x) for x in (r, v, mask))
    advantages, returns = map(np.asarray, gae(*arrays, gamma=gamma, lam=lam))
    advantages = normalize_masked(advantages, mask)
    return [
        dataclasses.replace(
            o.sample if np.isfinite(rewards[i]) else mask_sample(o.sample),
            advantages=pad_prompt(o, advantages[i]),
            returns=pad_prompt(o, returns[i]),
            values=pad_prompt(o, v[i]),
        )
        for i, o in enumerate(outputs)
    ]


def assign_return_credit(
    outputs: Sequence[Output],
    rewards: np.ndarray,
    ref_logps: Sequence[np.ndarray] | None,
    *,
    kl_coef: float,
) -> list[Sample]:
    """Returns samples with REINFORCE++'s advantages (Hu 2025).

    A_t = r - β Σ_{s≥t} log(π_old/π_ref), normalised over the batch's tokens. This is
    `assign_critic_credit` with V = 0 and γ = λ = 1; its arguments are the same.
    """
    nothing = [np.zeros(len(o.tokens), np.float32) for o in outputs]
    samples = assign_critic_credit(
        outputs, rewards, nothing, ref_logps, kl_coef=kl_coef, gamma=1.0, lam=1.0
    )
    return [dataclasses.replace(s, returns=None, values=None) for s in samples]


def log_ratio_sums(
    outputs: Sequence[Output], ref_logps: Sequence[np.ndarray]
) -> np.ndarray:
    """Returns log π_old(o|q) - log π_ref(o|q) of each output's sampled tokens, [N]."""
    pairs = zip(outputs, ref_logps, strict=True)
    sums = [((np.asarray(o.logps) - ref) * o.sampled).sum() for o, ref in pairs]
    return np.array(sums, np.float32)


def normalize_masked(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns x with mean 0 and variance 1 where the mask is not 0, and 0 elsewhere."""
    # float64 sums float32 numbers exactly, so that equal values become exactly 0.
    held = x[mask > 0].astype(np.float64)
    if held.size < 2:
        return np.zeros_like(x)
    scaled = (x - held.mean()) / (held.std(ddof=1) + 1e-8)
    return np.where(mask > 0, scaled, 0).astype(x.dtype)


def make_preference_pairs(
    outputs: Sequence[Output],
    rewards: np.ndarray,
    group_size: int,
    rng: np.random.Generator,
) -> list[Sample]:
    """Returns DPO's pairs as samples in the order o⁺, o⁻, o⁺, o⁻, ….

    Within each group, right outputs (reward above 0) are paired with wrong ones at
    random, until one kind is used up. A group of one kind has no pair.

    Args:
      outputs: N outputs, the G of a question side by side.
      rewards: [N].
      group_size: G.
      rng: draws the pairs.
    """
    chosen: list[Sample] = []
    for start in range(0, len(outputs), group_size):
        group = rewards[start : start + group_size]
        right, wrong = (
            rng.permutation(start + np.flatnonzero(x)) for x in (group > 0, group <= 0)
        )
        for pair in zip(right, wrong, strict=False):
            chosen += [outputs[i].sample for i in pair]
    return chosen


def overlong_punishment(lengths: Sequence[int], limit: int, buffer: int) -> np.ndarray:
    """Returns DAPO's soft overlong punishment, [N] (Yu et al. 2025, equation 13).

    It is 0 up to limit - buffer tokens and then falls linearly to -1 at the limit.

    >>> overlong_punishment([5, 8, 9, 10], limit=10, buffer=4).tolist()
    [0.0, -0.5, -0.75, -1.0]
    """
    over = np.asarray(lengths, np.float32) - (limit - buffer)
    return 0.0 - np.clip(over / max(buffer, 1), 0.0, 1.0)


def with_advantages(outputs: Sequence[Output], values: Sequence[Any]) -> list[Sample]:
    """Returns the outputs' samples with Â: one number each, or one for each token."""
    pairs = zip(outputs, values, strict=True)
    return [dataclasses.replace(o.sample, advantages=a) for o, a in pairs]


def mask_sample(sample: Sample) -> Sample:
    """Returns the sample with none of its tokens in the loss."""
    return dataclasses.replace(sample, mask=[0] * len(sample.tokens))


def has_gradient(sample: Sample) -> bool:
    """Returns whether the policy's loss has a gradient on the sample."""
    return any(sample.mask) and bool(np.any(sample.advantages))


def zeros_for_outputs(outputs: Sequence[Output]) -> np.ndarray:
    """Returns zeros [N, C]; C takes few values, so that few shapes are compiled."""
    longest = max(len(o.tokens) for o in outputs)
    return np.zeros((len(outputs), bucket_length(longest)), np.float32)


def pad_prompt(output: Output, values: np.ndarray) -> list[float]:
    """Returns an output's values as a list, with zeros for its prompt in front."""
    return [0.0] * len(output.prompt) + values[: len(output.tokens)].tolist()
