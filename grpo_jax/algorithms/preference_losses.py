"""DPO's loss on pairs of a preferred output o+ and a rejected output o-.

The function is pure and needs only jax.

Axes: B pairs, T and S tokens of o+ and o-. Masked positions may hold any value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from grpo_jax.algorithms.reductions import (
    at_least_1,
    check_shapes,
    jit_loss,
    nonzero_divisor,
    token_mean,
    weights_and_cleaner,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Num

    from grpo_jax.algorithms.reductions import LossAndMetrics


@jit_loss("length_normalized")
def dpo_loss(
    chosen_logps: Float[Array, "B T"],
    rejected_logps: Float[Array, "B S"],
    ref_chosen_logps: Float[Array, "B T"],
    ref_rejected_logps: Float[Array, "B S"],
    chosen_mask: Num[Array, "B T"],
    rejected_mask: Num[Array, "B S"],
    *,
    beta: ArrayLike = 0.1,
    length_normalized: bool = False,
    normalizer: ArrayLike | None = None,
) -> LossAndMetrics:
    """Returns the DPO loss (Rafailov et al. 2023; DeepSeekMath, appendix A.1.4).

        loss = - mean log σ(β Δ),   Δ = Σ_t log π_θ/π_ref(o+) - Σ_t log π_θ/π_ref(o-)

    A pair in which either side has no unmasked token adds 0.

    Args:
      chosen_logps, rejected_logps: log π_θ of the tokens of o+, [B, T], and o-, [B, S].
      ref_chosen_logps, ref_rejected_logps: log π_ref of the same tokens. No gradient
        flows into them.
      chosen_mask, rejected_mask: 1 where a token counts.
      beta: β.
      length_normalized: whether Δ has means over tokens, 1/|o| Σ_t, in place of sums,
        as in DeepSeekMath's equation 12 and TRL's loss_type="sigmoid_norm".
      normalizer: the number of pairs in the whole batch, if this call holds a part of
        it. The losses of the parts then sum to the whole's.

    Returns:
      The loss, and the metrics rewards/{chosen,rejected,margins,accuracies}. The
      implicit rewards are β times the two terms of Δ; means are over the pairs that
      have tokens on both sides.

    Raises:
      ValueError: a wrong shape.

    >>> import jax.numpy as jnp
    >>> half, ones = jnp.log(jnp.full((1, 2), 0.5)), jnp.ones((1, 2))
    >>> quarter = jnp.log(jnp.full((1, 2), 0.25))
    >>> loss, metrics = dpo_loss(half, quarter, quarter, quarter, ones, ones, beta=0.5)
    >>> round(float(loss), 4)  # Δ = 2 ln 2, and σ(ln 2) = 2/3
    0.4055
    """
    chosen = dict(ref_chosen_logps=ref_chosen_logps, chosen_mask=chosen_mask)
    check_shapes(chosen_logps, chosen, "chosen_logps")
    rejected = dict(ref_rejected_logps=ref_rejected_logps, rejected_mask=rejected_mask)
    check_shapes(rejected_logps, rejected, "rejected_logps")
    if len(chosen_logps) != len(rejected_logps):
        raise ValueError(
            f"{len(chosen_logps)} chosen rows, {len(rejected_logps)} rejected: "
            "row i of both is one pair"
        )

    def side(logps, ref_logps, mask):
        """Returns Σ_t (or 1/|o| Σ_t) log π_θ/π_ref, and whether any token counts."""
        m, clean = weights_and_cleaner(mask, chosen_logps, rejected_logps)
        ratio = clean(logps) - jax.lax.stop_gradient(clean(ref_logps))
        divisor = at_least_1(m.sum(-1)) if length_normalized else 1
        return (m * ratio).sum(-1) / divisor, (m > 0).any(-1)

    better, has_chosen = side(chosen_logps, ref_chosen_logps, chosen_mask)
    worse, has_rejected = side(rejected_logps, ref_rejected_logps, rejected_mask)
    counts = (has_chosen & has_rejected).astype(better.dtype)
    pairs = len(counts) if normalizer is None else normalizer
    loss = -(counts * jax.nn.log_sigmoid(beta * (better - worse))).sum()

    metrics = {
        "rewards/chosen": token_mean(beta * better, counts),
        "rewards/rejected": token_mean(beta * worse, counts),
        "rewards/margins": token_mean(beta * (better - worse), counts),
        "rewards/accuracies": token_mean(better > worse, counts),
    }
    return loss / nonzero_divisor(pairs), jax.lax.stop_gradient(metrics)
