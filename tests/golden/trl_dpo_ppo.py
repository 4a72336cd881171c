"""Golden values of TRL's DPO, and of PPO as TRL had it: the script that made the .npz.

In: an environment with trl 1.16.0 and torch. Out: `trl_dpo_ppo.npz` beside this file.
Run: `python tests/golden/trl_dpo_ppo.py`. DPO is TRL's own `DPOTrainer._compute_loss`;
only its model's forward pass is replaced, by a leaf tensor. TRL 1.16 has no PPO any
more: the formulas of its PPO trainer (clipped surrogate, clipped value loss, GAE; means
over all tokens; verl has the same) are written out in torch.
"""

import collections
import json
import pathlib
import types

import numpy as np

B, T = 5, 6
DPO_CASES = [
    dict(loss="sigmoid", beta=0.1),
    dict(loss="sigmoid", beta=2.0),
    dict(loss="sigmoid_norm", beta=0.1),
    dict(loss="sigmoid_norm", beta=2.0),
]
VALUE_CLIPS = (0.05, 0.2, 1.0)
GAMMA, LAMBDA = 0.9, 0.8


def inputs():
    """Rows 0..B-1 are o+, B..2B-1 their o-; every row has a token."""
    rng = np.random.default_rng(0)
    lengths = np.array([6, 3, 1, 5, 2, 4, 6, 2, 1, 5])
    mask = (np.arange(T) < lengths[:, None]).astype(np.int64)
    logps = -rng.exponential(1.0, (2 * B, T))
    values = rng.normal(0, 1, (2 * B, T))
    return dict(
        mask=mask,
        logps=logps,
        old_logps=logps + rng.normal(0, 0.4, logps.shape),
        ref_logps=logps + rng.normal(0, 0.6, logps.shape),
        values=values,
        old_values=values + rng.normal(0, 0.3, values.shape),
        rewards=rng.normal(0, 1, values.shape),
    )


def trl_dpo(arrays, case):
    import torch  # pyrefly: ignore[missing-import]
    from trl import DPOTrainer  # pyrefly: ignore[missing-import]

    mask = torch.tensor(arrays["mask"])
    leaf = torch.tensor(arrays["logps"]).requires_grad_()
    ref = (torch.tensor(arrays["ref_logps"]) * mask).sum(-1)
    nothing = torch.zeros(2 * B, T)
    outputs = types.SimpleNamespace(
        log_probs=leaf * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0
    )

    trainer = object.__new__(DPOTrainer)
    trainer.__dict__.update(
        model=types.SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[case["loss"]],
        loss_weights=[1.0],
        beta=case["beta"],
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        _metrics={"train": collections.defaultdict(list)},
    )
    prompt = torch.zeros(2 * B, 1, dtype=torch.long)
    batch = dict(
        input_ids=torch.zeros(2 * B, T + 1, dtype=torch.long),
        attention_mask=torch.cat([1 + prompt, mask], 1),
        completion_mask=torch.cat([prompt, mask], 1),
        ref_chosen_logps=ref[:B],
        ref_rejected_logps=ref[B:],
    )
    loss = trainer._compute_loss(lambda **_: outputs, batch, return_outputs=False)
    loss.backward()
    metrics = {k: v[0] for k, v in trainer._metrics["train"].items() if "rewards/" in k}
    return float(loss.detach()), leaf.grad.numpy(), metrics


def gae(arrays):
    """The reversed loop of TRL's PPO trainer; advantages are not whitened here."""
    mask, rewards, values = (arrays[k] for k in ("mask", "rewards", "values"))
    last, backwards = np.zeros(2 * B), []
    for t in reversed(range(T)):
        following = values[:, t + 1] * mask[:, t + 1] if t < T - 1 else 0.0
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        last = (delta + GAMMA * LAMBDA * last) * mask[:, t]
        backwards.append(last)
    advantages = np.stack(backwards[::-1], axis=1)
    return advantages, (advantages + values) * mask


def ppo(arrays, advantages, returns, clip):
    """(policy loss, its gradient, value loss, its gradient), means over all tokens."""
    import torch  # pyrefly: ignore[missing-import]

    a, r, mask = (torch.tensor(x) for x in (advantages, returns, arrays["mask"]))
    logps, values = (
        torch.tensor(arrays[k]).requires_grad_() for k in ("logps", "values")
    )
    ratio = torch.exp(logps - torch.tensor(arrays["old_logps"]))
    policy = torch.max(-a * ratio, -a * torch.clamp(ratio, 1 - clip, 1 + clip))
    policy = (policy * mask).sum() / mask.sum()
    policy.backward()
    old = torch.tensor(arrays["old_values"])
    clipped = torch.clamp(values, old - clip, old + clip)
    value = torch.max(torch.square(values - r), torch.square(clipped - r))
    value = 0.5 * (value * mask).sum() / mask.sum()
    value.backward()
    losses = float(policy.detach()), float(value.detach())
    return losses[0], logps.grad.numpy(), losses[1], values.grad.numpy()


def main():
    arrays = inputs()
    dpo = [trl_dpo(arrays, case) for case in DPO_CASES]
    advantages, returns = gae(arrays)
    results = [ppo(arrays, advantages, returns, clip) for clip in VALUE_CLIPS]
    policy, policy_gradient, value, value_gradient = (
        np.stack(x) for x in zip(*results, strict=True)
    )
    np.savez(
        pathlib.Path(__file__).with_suffix(".npz"),
        **arrays,
        cases=json.dumps(DPO_CASES),
        dpo=np.array([loss for loss, _, _ in dpo]),
        dpo_gradient=np.stack([gradient for _, gradient, _ in dpo]),
        dpo_metrics=json.dumps([metrics for _, _, metrics in dpo]),
        gamma=GAMMA,
        lam=LAMBDA,
        advantages=advantages,
        returns=returns,
        clips=np.array(VALUE_CLIPS),
        policy=policy,
        policy_gradient=policy_gradient,
        value=value,
        value_gradient=value_gradient,
    )


if __name__ == "__main__":
    main()
