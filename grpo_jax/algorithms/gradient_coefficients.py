"""The gradient coefficients GC of DeepSeekMath's unified paradigm (section 5.2).

The formulas are stated here without the losses. Tests show that the losses have these
gradients. All functions are pure and need only jax.

Axes: B outputs (rows), T tokens. Masked positions may hold any value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from grpo_jax.algorithms.reductions import (
    advantages_by_token,
    at_least_1,
    check_choice,
    check_shapes,
    is_off,
    jit_loss,
    weights_and_cleaner,
)

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float, Num

METHODS = ("sft", "rft", "online_rft", "dpo", "ppo")
METHODS += ("grpo", "grpo_process", "grpo_iterative")
METHODS += ("dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_pp")
_BY_TOKEN = ("dapo", "cispo", "reinforce_pp")  # mean over the batch's tokens
_MAX_EXPONENT = 20.0  # no ratio above e^20, as in the losses


@jit_loss("method", "length_normalized", pairs={"kl_coef": "ref_logps"})
def gradient_coefficient(
    method: str,
    logps: Float[Array, "B T"],
    mask: Num[Array, "B T"],
    *,
    advantages: Float[Array, "B"] | Float[Array, "B T"] | None = None,
    old_logps: Float[Array, "B T"] | None = None,
    ref_logps: Float[Array, "B T"] | None = None,
    kl_coef: ArrayLike = 0.0,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike | None = None,
    beta: ArrayLike = 0.1,
    length_normalized: bool = True,
    max_length: ArrayLike | None = None,
) -> Float[Array, "B T"]:
    """Returns GC, the coefficient of ∇ log π_θ (section 5.2, appendix A.1).

        ∇J = mean_i 1/|o_i| Σ_t GC_it ∇ log π_θ(o_it | q, o_i<t)                 (5)

    | method | GC |
    |---|---|
    | sft | 1 |
    | rft, online_rft | I(o): `advantages`, 1 where the answer is right, else 0 |
    | dpo | +β σ(-β Δ) for o+, -β σ(-β Δ) for o-; Δ of means over tokens (12) |
    | ppo | A_t |
    | grpo, grpo_process, grpo_iterative | Â_it + β (π_ref/π_θ - 1) |
    | dapo | grpo's times |o_i| B / Σ|o|, for a mean over the batch's tokens |
    | dr_grpo | grpo's times |o_i| / max_length |
    | gspo | grpo's with ρ_i = exp(mean_t log ρ_it) |
    | cispo | min(ρ, ε_high) Â, times |o_i| B / Σ|o| |
    | rloo | |o_i| Â_i: REINFORCE on the log π of an output, a sum over tokens |
    | reinforce_pp | ppo's times |o_i| B / Σ|o| |

    From ppo on, the table shows the case π_old = π_θ. With `old_logps`, A becomes ρ A,
    or 0 where the clip acts: ρ > 1 + ε_high with A > 0, or ρ < 1 - ε_low with A < 0.
    In ppo, rloo and reinforce_pp the KL term is in the reward, and so in A.

    For dpo, row 2k is o+ and row 2k + 1 its o-. ∇J is then the mean over pairs of the
    sum over both. A pair in which either output has no unmasked token gets 0.

    Args:
      method: a row of the table. The three GRPO rows have the same formula; they differ
        in where Â and π_ref come from.
      logps: log π_θ of the tokens, [B, T].
      mask: 1 where a token counts, [B, T].
      advantages: I(o), A_t or Â, [B] or [B, T]; for every row but sft and dpo.
      old_logps: log π_old, [B, T]; None: π_old = π_θ.
      ref_logps: log π_ref, [B, T]; for dpo, and for grpo unless kl_coef is 0.
      kl_coef: GRPO's β.
      clip_low, clip_high: ε_low and ε_high (None: ε_low). For cispo, clip_high is the
        bound on ρ itself.
      beta: DPO's β.
      length_normalized: whether DPO's Δ has means over tokens; if it has sums, GC gets
        the factor |o_i|.
      max_length: dr_grpo's divisor, in tokens.

    Returns:
      GC, [B, T], 0 where masked.

    Raises:
      ValueError: an unknown method, a wrong shape, or a missing array.

    >>> logps, mask = jnp.log(jnp.array([[0.5, 0.25]])), jnp.array([[1, 1]])
    >>> options = dict(advantages=jnp.ones(1), ref_logps=jnp.log(jnp.full((1, 2), 0.5)))
    >>> gradient_coefficient("grpo", logps, mask, kl_coef=0.5, **options).tolist()
    [[1.0, 1.5]]
    """
    check_choice("method", method, METHODS)
    check_shapes(logps, dict(mask=mask, old_logps=old_logps, ref_logps=ref_logps))
    m, clean = weights_and_cleaner(mask, logps)
    logp = clean(logps)
    if method == "sft":
        return clean(jnp.ones_like(logp))
    if method == "dpo":
        if ref_logps is None:
            raise ValueError("ref_logps is None: dpo needs log π_ref")
        if len(logp) % 2:
            raise ValueError(f"dpo has {len(logp)} rows: o+ and o- must alternate")
        length = m.sum(-1)
        divisor = at_least_1(length) if length_normalized else 1
        ratio = (m * (logp - clean(ref_logps))).sum(-1) / divisor
        strength = beta * jax.nn.sigmoid(beta * (ratio[1::2] - ratio[0::2]))
        both = (length[0::2] > 0) & (length[1::2] > 0)
        strength = jnp.where(both, strength, 0)
        gc = jnp.stack([strength, -strength], axis=1).reshape(-1)
        if not length_normalized:
            gc = gc * length
        return clean(jnp.broadcast_to(gc[:, None], logp.shape))

    if advantages is None:
        raise ValueError(f"advantages is None: {method} needs them")
    a = advantages_by_token(advantages, logps)
    gc = clean(jnp.broadcast_to(a, logp.shape))
    if method in ("rft", "online_rft"):
        return gc
    length = m.sum(-1, keepdims=True)
    if old_logps is not None:
        if method == "rloo":
            raise ValueError("rloo takes one step from π_old: it has no old_logps")
        log_rho = logp - clean(old_logps)
        if method == "gspo":
            log_rho = (m * log_rho).sum(-1, keepdims=True) / at_least_1(length)
        rho = clean(jnp.exp(jnp.minimum(log_rho, _MAX_EXPONENT)) + 0 * logp)
        high = clip_low if clip_high is None else clip_high
        if method == "cispo":
            gc = jnp.minimum(rho, high) * gc
        else:
            held = jnp.where(gc > 0, rho > 1 + high, rho < 1 - clip_low)
            gc = jnp.where(held, 0, rho * gc)
    if method not in ("ppo", "rloo", "reinforce_pp") and not is_off(kl_coef):
        if ref_logps is None:
            raise ValueError("ref_logps is None: pass log π_ref, or kl_coef=0.0")
        from_ref = jnp.expm1(jnp.minimum(clean(ref_logps) - logp, _MAX_EXPONENT))
        gc = gc + kl_coef * clean(from_ref)
    if method in _BY_TOKEN:
        gc = gc * length * len(logp) / at_least_1(m.sum())
    elif method == "rloo":
        gc = gc * length
    elif method == "dr_grpo":
        if max_length is None:
            raise ValueError("max_length is None: dr_grpo divides by it")
        gc = gc * length / max_length
    return gc
