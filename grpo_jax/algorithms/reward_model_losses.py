"""The reward model's loss on scores and labels of tokens.

Labelled tokens are an output's last token (outcome supervision) or the last token of
each step (process supervision). The function is pure and needs only jax.

Axes: B rows, T tokens. Masked positions may hold any value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from grpo_jax.algorithms.reductions import (
    at_least_1,
    check_shapes,
    token_mean,
    weights_and_cleaner,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Num

    from grpo_jax.algorithms.reductions import LossAndMetrics


@jax.jit
def reward_loss(
    scores: Float[Array, "B T"],
    labels: Num[Array, "B T"],
    mask: Num[Array, "B T"],
    *,
    normalizer: ArrayLike | None = None,
) -> LossAndMetrics:
    """Returns the binary cross-entropy of a reward model.

        loss = - mean_t [ y_t log σ(s_t) + (1 - y_t) log σ(-s_t) ]

    The mean is over the labelled tokens (Cobbe et al. 2021; Wang et al. 2023).

    Args:
      scores: s, the logits of "right", [B, T].
      labels: y, [B, T]: 0 or 1 (hard), or a fraction between them (soft).
      mask: 1 at the tokens that have a label, [B, T].
      normalizer: the number of labelled tokens in the whole batch, if this call holds a
        part of it. The losses of the parts then sum to the whole's.

    Returns:
      The loss, and the metrics accuracy (how often σ(s) and y are on the same side of
      ½), score and label (their means), and num_tokens (labelled tokens).

    Raises:
      ValueError: shapes that differ.

    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[9.0, 0.0, jnp.log(3.0)]])
    >>> loss, metrics = reward_loss(scores, jnp.array([[0, 0, 1]]),
    ...                             jnp.array([[0, 1, 1]]))
    >>> round(float(loss), 4) == round(float((jnp.log(2) + jnp.log(4 / 3)) / 2), 4)
    True
    """
    check_shapes(scores, dict(labels=labels, mask=mask), "scores")
    m, clean = weights_and_cleaner(mask != 0, scores)
    s, y = clean(scores), clean(labels)
    divisor = at_least_1(m.sum() if normalizer is None else normalizer)
    # -y log σ(s) - (1 - y) log σ(-s). The form log(1 + e^s) - y s would lose digits
    # where the model is confident.
    loss = (m * (y * jax.nn.softplus(-s) + (1 - y) * jax.nn.softplus(s))).sum()
    loss = loss / divisor
    metrics = {
        "accuracy": token_mean((s > 0) == (y > 0.5), m),
        "score": token_mean(s, m),
        "label": token_mean(y, m),
        "num_tokens": m.sum(),
    }
    return loss, jax.lax.stop_gradient(metrics)
