"""Advantages: how much better an output is than the others of its group.

In: rewards r_i of N outputs, the G outputs of a question side by side.
Out: Â_i, [N], float32 at least. Pure functions, jax alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Num


def group_advantages(
    rewards: Num[Array, "N"],
    group_size: int,
    *,
    scale: str = "group",
    baseline: str = "mean",
    ddof: int = 1,
    eps: ArrayLike = 1e-4,
) -> Float[Array, "N"]:
    """Outcome supervision (DeepSeekMath, section 4.1.2).

        Â_i = (r_i - mean(r)) / (std(r) + eps)      over the G outputs of one question

    Args:
      rewards: [N]; the outputs of a question are contiguous. NaN or infinite: the
        output was not scored, it is left out of the statistics and gets 0.
      group_size: G; divides N.
      scale: what std is over: "group" (the paper), "batch", or "none" (Dr. GRPO).
      baseline: "mean" (the paper) or "leave_one_out" (RLOO: the mean of the others).
      ddof: std divides by (count - ddof); 1 as in TRL, verl and tunix.
      eps: added to std; the paper has none.

    Returns:
      [N]. Exactly 0 in a group whose rewards are all equal or where fewer than two
      were scored.

    Raises:
      ValueError: N is not a multiple of group_size, or an unknown option.

    >>> group_advantages(jnp.array([1.0, 0.0, 5.0, 5.0]), 2, eps=0.0).tolist()
    [0.7071067690849304, -0.7071067690849304, 0.0, 0.0]
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r} is not one of group, batch, none")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline={baseline!r} is not one of mean, leave_one_out")
    rewards = jnp.asarray(rewards)
    if rewards.ndim != 1 or group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards has shape {rewards.shape}; [N] with N a multiple of "
            f"group_size={group_size} is needed"
        )
    return _group_advantages(rewards, eps, group_size, scale, baseline, ddof)


@functools.partial(jax.jit, static_argnames=("group_size", "scale", "baseline", "ddof"))
def _group_advantages(rewards, eps, group_size, scale, baseline, ddof):
    dtype = jnp.promote_types(rewards.dtype, jnp.float32)
    r = rewards.astype(dtype).reshape(-1, group_size)
    scored = jnp.isfinite(r)
    r = jnp.where(scored, r, 0)
    count = scored.sum(-1, keepdims=True)

    mean = r.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    if baseline == "leave_one_out":
        center = r - (r.sum(-1, keepdims=True) - r) / jnp.maximum(count - 1, 1)
    else:
        center = r - mean

    # Rounding makes std about 6e-8 where eight rewards are all 0.95: compare, so that
    # a tied group is exactly 0 and not noise over noise.
    highest = jnp.where(scored, r, -jnp.inf).max(-1, keepdims=True)
    lowest = jnp.where(scored, r, jnp.inf).min(-1, keepdims=True)
    counts = scored & (count >= 2) & (highest > lowest)
    if scale == "none":
        return jnp.where(counts, center, 0).reshape(-1)
    if scale == "group":
        squares = jnp.where(scored, jnp.square(r - mean), 0)
        variance = squares.sum(-1, keepdims=True) / jnp.maximum(count - ddof, 1)
    else:
        total = scored.sum()
        batch_mean = r.sum() / jnp.maximum(total, 1)
        squares = jnp.where(scored, jnp.square(r - batch_mean), 0)
        variance = squares.sum() / jnp.maximum(total - ddof, 1)
    std = jnp.sqrt(jnp.where(counts, variance, 1))
    return jnp.where(counts, center / (std + eps), 0).reshape(-1)
