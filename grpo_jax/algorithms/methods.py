"""The table of training methods: DeepSeekMath's unified paradigm (section 5.2).

    ∇J(θ) = E_{(q,o) ~ D} [ 1/|o| Σ_t GC(q, o, t) ∇ log π_θ(o_t | q, o_<t) ]

Methods differ in the data source D, the reward function and the gradient coefficient
GC. `training/rl.py` is the loop and `training/train_step.py` the compiled step of all.

    method          D: outputs of   reward  GC at π_θ = π_old
    sft             the data set    –       1
    rft             π_sft           rule    I(o): 1 if the answer is right, else 0
    online_rft      π_θ             rule    I(o)
    dpo             π_sft, pairs    rule    ±β σ(-β Δ), + for o⁺, - for o⁻
    ppo             π_θ             rule    A_t, by GAE with a learned value function
    grpo            π_θ, groups     rule    Â_i + β (π_ref/π_θ - 1)
    grpo_process    π_θ, groups     steps   Â_it + β (π_ref/π_θ - 1)
    grpo_iterative  π_θ, groups     model   Â_i + β (π_ref/π_θ - 1), π_ref ← π_θ

`gradient_coefficients.py` computes GC, and tests show that each method's loss has it.
dapo, dr_grpo, gspo and cispo change settings of GRPO; `METHODS` says which. rloo and
reinforce_pp are methods of their own:

    rloo            π_θ, groups     rule    |o| (R_i - mean of the others' R)
                    R = r - β Σ_t log(π_θ/π_ref): the KL term is in the reward; the
                    gradient is of log π(o|q), a sum over tokens; one update a rollout
    reinforce_pp    π_θ             rule    A_t, the batch's returns normalised
                    R_t = r - β Σ_s≥t log(π_θ/π_ref); PPO's clip; a mean over tokens

`grpo` with advantage_baseline=leave_one_out and advantage_scale=none has RLOO's
baseline in GRPO's loss. The methods from ppo on also have these options, which are off
by default:

    importance_cap        truncated importance sampling between sampler and trainer
                          (Yao et al. 2025)
    entropy_coef          an entropy bonus (Mnih et al. 2016)
    mask_truncated        leaves truncated outputs out of the loss (DAPO, Yu et al.
                          2025)
    overlong_buffer       a soft penalty on length, in tokens (DAPO)
    updates_per_rollout   μ > 1, with log π_old of the policy that sampled (section
                          4.1); not for rloo, which takes one step per rollout
    max_staleness         1: the next rollout starts before the update, so that the host
                          grades while the device samples; importance_cap, by default 2
                          then, corrects for the difference between the policies

GRPO and its variants have three more (grpo_process has delta alone):

    delta                 the bound on ρ where Â < 0 (two-sided clip; INTELLECT-2, Prime
                          Intellect 2025)
    reward_normalization  each: normalises several reward functions before their sum
                          (GDPO, Liu et al. 2026)
    dynamic_sampling      replaces groups in which all outputs are right, or none is
                          (DAPO)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table; `fields` are its config fields and their defaults."""

    source: str  # of the outputs: dataset | instruct (π_sft) | policy
    reward: str  # default of rewards.functions; "model": a reward model
    coefficient: str  # rewards to advantages: see training/credit.py
    loss: str  # sft | dpo | ppo | grpo: see training/objectives.py
    kl: str = "loss"  # where the KL term is added: loss | reward
    fields: Mapping[str, Any] = field(default_factory=dict)


_POLICY: dict[str, Any] = {  # of PPO and GRPO; kl_coef and μ as in section 4.2
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
    # Rafailov et al. 2023. Means over tokens as in the paper's equation 12, with a β
    # that suits them (Lambert et al. 2024).
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
    # DAPO (Yu et al. 2025): clip-higher, token mean, dynamic sampling, no KL. Setting
    # overlong_buffer adds its soft penalty on overlong outputs.
    "dapo": _grpo(
        kl_coef=0.0, clip_high=0.28, aggregate="token_mean", dynamic_sampling=4
    ),
    # Dr. GRPO (Liu et al. 2025): no division by the std or by an output's length.
    "dr_grpo": _grpo(kl_coef=0.0, advantage_scale="none", aggregate="constant"),
    # GSPO (Zheng et al. 2025): one ratio per sequence, with a much smaller clip.
    "gspo": _grpo(kl_coef=0.0, importance="sequence", clip_low=3e-4, clip_high=4e-4),
    # CISPO (MiniMax 2025): bounds the ratio but keeps the token's gradient.
    "cispo": _grpo(
        kl_coef=0.0, surrogate="cispo", clip_high=5.0, aggregate="token_mean"
    ),
    # RLOO (Ahmadian et al. 2024): REINFORCE with the mean of the other outputs as its
    # baseline. With one update per rollout ρ is 1, so there is no clip.
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
    # REINFORCE++ (Hu 2025): PPO without a critic; normalises over the batch's tokens.
    "reinforce_pp": Method(
        source="policy",
        reward="rule",
        coefficient="returns",
        loss="grpo",
        kl="reward",
        fields=_POLICY | {"aggregate": "token_mean"},
    ),
}
METHOD_FIELDS: tuple[str, ...] = tuple(
    dict.fromkeys(name for method in METHODS.values() for name in method.fields)
)
