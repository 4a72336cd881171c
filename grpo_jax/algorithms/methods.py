"""The unified paradigm: every method is one row of one table (section 5.2, appendix A).

    ∇J(θ) = E_{(q,o) ~ D} [ 1/|o| Σ_t GC(q, o, t) ∇ log π_θ(o_t | q, o_<t) ]

What tells methods apart is the data source D, the reward function and the gradient
coefficient GC; one loop (`rl.py`) and one compiled step (`update.py`) run them all.

    method          D: outputs of   reward  GC at π_θ = π_old
    sft             the data set    –       1
    rft             π_sft           rule    I(o): 1 if the answer is right, else 0
    online_rft      π_θ             rule    I(o)
    dpo             π_sft, pairs    rule    ±β σ(-β Δ), + for o⁺, - for o⁻
    ppo             π_θ             rule    A_t, by GAE with a learned value function
    grpo            π_θ, groups     rule    Â_i + β (π_ref/π_θ - 1)
    grpo_process    π_θ, groups     steps   Â_it + β (π_ref/π_θ - 1)
    grpo_iterative  π_θ, groups     model   Â_i + β (π_ref/π_θ - 1), π_ref ← π_θ

`coefficients.py` states GC as arrays; tests show that each method's own loss has it.
Below the paper's rows stand GRPO's relatives, each with what it changes; rloo and
reinforce_pp are their own papers' methods:

    rloo            π_θ, groups     rule    |o| (R_i - mean of the others' R)
                    R = r - β Σ_t log(π_θ/π_ref): the KL term is in the reward; the
                    gradient is of log π(o|q), a sum over tokens; one update a rollout
    reinforce_pp    π_θ             rule    A_t, the batch's returns normalised
                    R_t = r - β Σ_s≥t log(π_θ/π_ref); PPO's clip; a mean over tokens

(`grpo` with advantage_baseline=leave_one_out and advantage_scale=none has RLOO's
baseline in GRPO's loss.) Rows of PPO and GRPO also take these, off unless they are set:

    importance_cap        truncated importance sampling between sampler and trainer
                          (Yao et al. 2025)
    entropy_coef          an entropy bonus (Mnih et al. 2016)
    mask_truncated        outputs that were cut off teach nothing (DAPO, Yu et al. 2025)
    overlong_buffer       a soft punishment of length, in tokens (DAPO)
    updates_per_rollout   μ > 1, with log π_old of the policy that sampled (section
                          4.1); not rloo, which takes one step a rollout
    max_staleness         1: the next rollout starts before the update, so that the host
                          grades while the device samples; what the update changed is
                          corrected by importance_cap, then 2 unless set

and GRPO's: delta, the bound on ρ where Â < 0 (two-sided clip, INTELLECT-2, Prime
Intellect 2025); reward_normalization=each, several reward functions normalised before
they are summed (GDPO, Liu et al. 2026); dynamic_sampling (DAPO): groups of which all
outputs are right, or none is, are replaced.

In: nothing. Out: `METHODS`, which `config.py` checks a run against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row. `fields` are the config's fields that it reads, with its defaults."""

    source: str  # whose outputs it learns from: dataset | instruct (π_sft) | policy
    reward: str  # default of rewards.functions; "model": a trained outcome model
    coefficient: str  # how an output's reward becomes credit: see credit.py
    loss: str  # sft | dpo | ppo | grpo: see objectives.py
    kl: str = "loss"  # where β's KL term stands: loss | reward
    fields: Mapping[str, Any] = field(default_factory=dict)


_POLICY: dict[str, Any] = {  # PPO's and GRPO's, section 4.2
    "kl_coef": 0.04,  # β
    "clip_low": 0.2,  # ε
    "clip_high": None,  # the same as clip_low
    "aggregate": "sequence_mean",
    "updates_per_rollout": 1,  # μ
    "max_staleness": 0,
    "entropy_coef": 0.0,
    "importance_cap": None,
    "mask_truncated": False,
    "overlong_buffer": 0,
}
_GROUP: dict[str, Any] = {
    "delta": None,
    "kl_estimator": "k3",
    "importance": "token",
    "surrogate": "clip",
}
_OUTCOME: dict[str, Any] = {
    "advantage_scale": "group",
    "advantage_baseline": "mean",
    "reward_normalization": "sum",
    "dynamic_sampling": 0,
}
_GRPO = Method(
    source="policy",
    reward="rule",
    coefficient="outcome",
    loss="grpo",
    fields=_POLICY | _GROUP | _OUTCOME,
)


# Rejection sampling fine-tuning (Yuan et al. 2023).
_RFT = Method(
    source="instruct",
    reward="rule",
    coefficient="indicator",
    loss="sft",
    fields={"aggregate": "sequence_mean"},
)


def _grpo(**changes: Any) -> Method:
    return replace(_GRPO, fields={**_GRPO.fields, **changes})


METHODS: dict[str, Method] = {
    "sft": Method(source="dataset", reward="", coefficient="one", loss="sft"),
    "rft": _RFT,
    "online_rft": replace(_RFT, source="policy"),
    # Rafailov et al. 2023; per token, as the paper's equation 12 has it, with a β that
    # suits means over tokens (Lambert et al. 2024).
    "dpo": Method(
        source="instruct",
        reward="rule",
        coefficient="pairs",
        loss="dpo",
        fields={"dpo_beta": 5.0, "length_normalized": True},
    ),
    # Schulman et al. 2017, for language models as Ouyang et al. 2022.
    "ppo": Method(
        source="policy",
        reward="rule",
        coefficient="critic",
        loss="ppo",
        kl="reward",
        fields=_POLICY
        | {
            "gae_gamma": 1.0,
            "gae_lambda": 1.0,
            "value_clip": 0.2,
            "value_learning_rate": None,  # ten times the policy's
        },
    ),
    "grpo": _GRPO,
    "grpo_process": replace(
        _GRPO, reward="", coefficient="process", fields=_POLICY | _GROUP
    ),
    "grpo_iterative": replace(
        _grpo(iterations=2, replay=0.1),
        reward="model",  # Algorithm 1, section 4.1.4
    ),
    # DAPO (Yu et al. 2025): clip-higher, token mean, dynamic sampling, a soft
    # punishment of overlong outputs (set overlong_buffer), no KL.
    "dapo": _grpo(
        kl_coef=0.0, clip_high=0.28, aggregate="token_mean", dynamic_sampling=4
    ),
    # Dr. GRPO (Liu et al. 2025): no division by the std or by an output's length.
    "dr_grpo": _grpo(kl_coef=0.0, advantage_scale="none", aggregate="constant"),
    # GSPO (Zheng et al. 2025): one ratio a sequence, and its much smaller clip.
    "gspo": _grpo(kl_coef=0.0, importance="sequence", clip_low=3e-4, clip_high=4e-4),
    # CISPO (MiniMax 2025): the ratio is bounded, the token's gradient kept.
    "cispo": _grpo(
        kl_coef=0.0, surrogate="cispo", clip_high=5.0, aggregate="token_mean"
    ),
    # RLOO (Ahmadian et al. 2024): REINFORCE against the mean of the other outputs. With
    # one update a rollout ρ is 1, and no clip acts.
    "rloo": Method(
        source="policy",
        reward="rule",
        coefficient="outcome",
        loss="grpo",
        kl="reward",
        fields={
            name: value
            for name, value in _POLICY.items()
            if name not in ("clip_low", "clip_high", "updates_per_rollout")
        }
        | {
            "aggregate": "sequence_sum",
            "advantage_scale": "none",
            "advantage_baseline": "leave_one_out",
        },
    ),
    # REINFORCE++ (Hu 2025): PPO without a critic, normalised over the batch's tokens.
    "reinforce_pp": Method(
        source="policy",
        reward="rule",
        coefficient="returns",
        loss="grpo",
        kl="reward",
        fields=_POLICY | {"aggregate": "token_mean"},
    ),
}
OWN_FIELDS: tuple[str, ...] = tuple(
    dict.fromkeys(name for method in METHODS.values() for name in method.fields)
)
