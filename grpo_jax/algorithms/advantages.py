"""Advantages: how much better an output, a step or a token is than expected.

The first three functions compare the outputs of a question with each other; `gae`
compares PPO's rewards with a value function. Results are float32, or the input's dtype
if it is wider. All functions are pure and need only jax.

Axes: N outputs (B for PPO), T tokens, F reward functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from grpo_jax.algorithms.reductions import (
    check_choice,
    check_groups,
    check_shapes,
    jit_loss,
    weights_and_cleaner,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Num


@jit_loss("group_size", "scale", "baseline", "ddof")
def group_advantages(
    rewards: Num[Array, "N"],
    group_size: int,
    *,
    scale: str = "group",
    baseline: str = "mean",
    ddof: int = 1,
    eps: ArrayLike = 1e-4,
) -> Float[Array, "N"]:
    """Returns advantages of outcome supervision (DeepSeekMath, section 4.1.2).

        Â_i = (r_i - mean(r)) / (std(r) + eps)      over the G outputs of one question

    Args:
      rewards: [N]; the outputs of a question are contiguous. An output whose reward is
        NaN or infinite counts as not scored: it is left out of the statistics and its
        advantage is 0.
      group_size: G; divides N.
      scale: where std is taken: "group" (the paper), "batch", or "none" (Dr. GRPO).
      baseline: "mean" (the paper), "leave_one_out" (RLOO, Ahmadian et al. 2024: the
        mean of the others), or "batch" (REINFORCE++, Hu 2025: the mean of the batch,
        with scale "batch" or "none").
      ddof: std divides by (count - ddof); 1 as in TRL, verl and tunix.
      eps: added to std; the paper has none.

    Returns:
      [N]. Exactly 0 in a group whose rewards are all equal or in which fewer than two
      were scored. With baseline="batch" the whole batch is one group.

    Raises:
      ValueError: N is not a multiple of group_size, or an unknown option.

    >>> group_advantages(jnp.array([1.0, 0.0, 5.0, 5.0]), 2, eps=0.0).tolist()
    [0.7071067690849304, -0.7071067690849304, 0.0, 0.0]
    """
    check_choice("scale", scale, ("group", "batch", "none"))
    check_choice("baseline", baseline, ("mean", "leave_one_out", "batch"))
    if baseline == "batch" and scale == "group":
        raise ValueError("baseline='batch' has no group: scale='batch' or 'none'")
    rewards = jnp.asarray(rewards)
    check_groups("rewards", rewards, "N", group_size)
    r = rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32))
    r = r.reshape(-1, max(len(r), 1) if baseline == "batch" else group_size)
    scored = jnp.isfinite(r)
    r, counts = _mask_ties(r, scored)
    mean, std = _moments(r, scored, counts, ddof)
    center = r - mean
    if baseline == "leave_one_out":
        others = jnp.maximum(scored.sum(-1, keepdims=True) - 1, 1)
        center = r - (r.sum(-1, keepdims=True) - r) / others
    if scale == "none":
        return jnp.where(counts, center, 0).reshape(-1)
    if scale == "batch":
        flat, some = (1, r.size), counts.any(keepdims=True)
        _, std = _moments(r.reshape(flat), scored.reshape(flat), some, ddof)
    return jnp.where(counts, center / (std + eps), 0).reshape(-1)


def _mask_ties(r: Array, scored: Array) -> tuple[Array, Array]:
    """Returns r with 0 where not scored, and which outputs can get an advantage.

    A group is a row. Ties are found by comparison: with eight rewards of 0.95, rounding
    gives a std of about 6e-8, and the advantages would be rounding noise.
    """
    highest = jnp.where(scored, r, -jnp.inf).max(-1, keepdims=True)
    lowest = jnp.where(scored, r, jnp.inf).min(-1, keepdims=True)
    enough = scored.sum(-1, keepdims=True) >= 2
    return jnp.where(scored, r, 0), scored & enough & (highest > lowest)


def _moments(r: Array, scored: Array, counts: Array, ddof: int) -> tuple[Array, Array]:
    """Returns mean and std of a row's scored rewards; the std is 1 if none `counts`."""
    count = scored.sum(-1, keepdims=True)
    mean = r.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.where(scored, jnp.square(r - mean), 0).sum(-1, keepdims=True)
    variance = squares / jnp.maximum(count - ddof, 1)
    return mean, jnp.sqrt(jnp.where(counts, variance, 1))  # avoids sqrt's gradient at 0


@jit_loss("group_size", "scale", "baseline", "ddof", "normalize_sum")
def decoupled_advantages(
    rewards: Num[Array, "N F"],
    weights: Float[Array, "F"] | None,
    group_size: int,
    *,
    scale: str = "group",
    baseline: str = "mean",
    ddof: int = 1,
    eps: ArrayLike = 1e-4,
    normalize_sum: bool = True,
) -> Float[Array, "N"]:
    """Returns advantages that normalise each reward function before the sum.

    This is GDPO (Liu et al. 2026, arXiv 2601.05242).

        A_i = Σ_f w_f (r_if - mean(r_f)) / (std(r_f) + eps)      over the group
        Â_i = A_i / (std(A) + eps)                               over the batch

    Two outputs with rewards (0, 2) and (1, 1) have equal sums, but not equal normalised
    sums. A has mean 0 over every group, and so over the batch.

    Args:
      rewards: [N, F], r_f of each output. NaN or infinite: function f did not score the
        output, and contributes 0. An output that no function scored is left out.
      weights: w_f, [F]; None: 1 each.
      group_size, scale, baseline, ddof, eps: as in `group_advantages`, for every f.
      normalize_sum: apply the second line too, as TRL's "normalize_then_sum" does.

    Returns:
      [N]. Exactly 0 where every function's group is tied.

    Raises:
      ValueError: a wrong shape or an unknown option.

    >>> rewards = jnp.array([[1.0, 0.0], [0.0, 9.0], [1.0, 9.0]])
    >>> a = decoupled_advantages(rewards, None, 3, eps=0.0, normalize_sum=False)
    >>> [round(x, 4) for x in a.tolist()]
    [-0.5774, -0.5774, 1.1547]
    """
    rewards = jnp.asarray(rewards)
    check_groups("rewards", rewards, "N F", group_size)
    if weights is None:
        weights = jnp.ones(rewards.shape[1], rewards.dtype)
    if jnp.shape(weights) != rewards.shape[1:]:
        raise ValueError(
            f"weights has shape {jnp.shape(weights)}; a weight for each of the "
            f"{rewards.shape[1]} columns of rewards is needed"
        )
    each = jax.vmap(
        lambda r: group_advantages(
            r, group_size, scale=scale, baseline=baseline, ddof=ddof, eps=eps
        ),
        in_axes=1,
        out_axes=1,
    )(rewards)
    total = (each * jnp.asarray(weights).astype(each.dtype)[None]).sum(-1)
    if not normalize_sum:
        return total
    scored = jnp.isfinite(rewards).any(-1)
    variance = jnp.square(total).sum() / jnp.maximum(scored.sum() - ddof, 1)
    moves = total != 0
    return jnp.where(moves, total / (jnp.sqrt(jnp.where(moves, variance, 1)) + eps), 0)


@jit_loss("group_size", "ddof")
def process_advantages(
    step_rewards: Float[Array, "N T"],
    step_mask: Num[Array, "N T"],
    group_size: int,
    *,
    ddof: int = 1,
    eps: ArrayLike = 1e-4,
) -> Float[Array, "N T"]:
    """Returns advantages of process supervision (DeepSeekMath, section 4.1.3).

        r̃_j = (r_j - mean(R)) / (std(R) + eps)   R: all step rewards of the G outputs
        Â_t = Σ r̃_j over the steps j of the output that end at or after t

    Args:
      step_rewards: [N, T], read at the last token of each step; the outputs of a
        question are contiguous. A NaN or infinite reward is left out of R and adds 0.
      step_mask: [N, T], not 0 at the last token of each step.
      group_size: G; divides N.
      ddof, eps: as in `group_advantages`.

    Returns:
      [N, T]; 0 after an output's last step. Exactly 0 in a group whose step rewards are
      all equal, or that has fewer than two.

    Raises:
      ValueError: a wrong shape, or N is not a multiple of group_size.

    >>> rewards = jnp.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 9.0]])
    >>> ends = jnp.array([[0, 1, 0, 1], [1, 0, 1, 0]])  # R = {1, 1, 0, 0}
    >>> process_advantages(rewards, ends, 2, ddof=0, eps=0.0).tolist()
    [[2.0, 2.0, 1.0, 1.0], [-2.0, -1.0, -1.0, 0.0]]
    """
    check_shapes(step_rewards, dict(step_mask=step_mask), "step_rewards")
    check_groups("step_rewards", step_rewards, "N T", group_size)
    shape = jnp.shape(step_rewards)
    mask, clean = weights_and_cleaner(step_mask, step_rewards)
    r = clean(step_rewards)
    group = (shape[0] // group_size, group_size * shape[1])
    scored = (jnp.isfinite(r) & (mask != 0)).reshape(group)
    r, counts = _mask_ties(r.reshape(group), scored)
    mean, std = _moments(r, scored, counts, ddof)
    normalized = jnp.where(counts, (r - mean) / (std + eps), 0).reshape(shape)
    return jax.lax.cumsum(normalized, axis=1, reverse=True)


@jit_loss()
def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Num[Array, "B T"],
    *,
    gamma: ArrayLike = 1.0,
    lam: ArrayLike = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns PPO's advantages and returns, by GAE (Schulman et al. 2016).

        δ_t = r_t + γ V_t+1 - V_t,   A_t = δ_t + γ λ A_t+1,   R_t = A_t + V_t

    Args:
      rewards, values: r and V of each token, [B, T].
      mask: [B, T], not 0 where the policy chose the token. t+1 is the next such token;
        a tool's tokens in between are skipped. V after the last token is 0.
      gamma, lam: γ and λ.

    Returns:
      The advantages A and the returns R, [B, T], 0 where masked. A is not whitened.

    Raises:
      ValueError: a wrong shape.

    >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 9.0, 0.25]])
    >>> advantages, returns = gae(rewards, values, jnp.array([[1, 0, 1]]), lam=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([[0.125, 0.0, 0.75]], [[0.625, 0.0, 1.0]])
    """
    check_shapes(rewards, dict(values=values, mask=mask), "rewards")
    _, clean = weights_and_cleaner(mask, rewards, values)
    valid, r, v = jnp.asarray(mask) != 0, clean(rewards), clean(values)
    held = _discounted_sums(
        jnp.where(valid, 0, 1).astype(v.dtype), v
    )  # V at t or later
    after = jnp.pad(held, ((0, 0), (0, 1)))[:, 1:]
    error = clean(r + gamma * after - v)
    decay = jnp.where(valid, gamma * lam, 1).astype(v.dtype)  # passes A on
    advantages = clean(_discounted_sums(decay, error))
    return advantages, clean(advantages + v)


def _discounted_sums(decay: Array, x: Array) -> Array:
    """Returns y_t = x_t + decay_t y_t+1 along T, in log T steps."""

    def join(later, earlier):
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(join, (decay, x), axis=1, reverse=True)[1]
