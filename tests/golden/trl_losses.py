"""Golden values of TRL's GRPO loss and advantages: the script that made the .npz.

In: an environment with trl 1.16.0 and torch. Out: `trl_losses.npz` beside this file.
Run: `python tests/golden/trl_losses.py`. TRL's own `GRPOTrainer._compute_loss` runs on
random arrays; only its model's forward pass is replaced, by a leaf tensor.
The package does not need either.
"""

import collections
import json
import pathlib
import types

import numpy as np

B, T, MAX_LENGTH, NUM_ITEMS = 6, 7, 11, 40

# name -> (attributes of the trainer, attributes of its args, which inputs it gets)
DEFAULTS = dict(loss_type="grpo", importance_sampling_level="token", beta=0.0)
CASES = [
    dict(),
    dict(old=True),
    dict(old=True, tool_mask=True),
    dict(old=True, token_advantages=True),
    dict(old=True, beta=0.04),
    dict(beta=0.04),
    dict(old=True, beta=0.04, use_bias_correction_kl=True),
    dict(beta=0.04, use_bias_correction_kl=True),
    dict(old=True, epsilon_high=0.28),
    dict(old=True, epsilon_low=0.05, epsilon_high=0.5),
    dict(old=True, delta=1.5),
    dict(old=True, delta=1.5, beta=0.04, epsilon_high=0.28),
    dict(old=True, beta=0.04, weights=True),
    dict(old=True, loss_type="bnpo", beta=0.04),
    dict(old=True, loss_type="dapo"),
    dict(old=True, loss_type="dapo", beta=0.04, epsilon_high=0.28, weights=True),
    dict(old=True, loss_type="dapo", num_items=True),
    dict(old=True, loss_type="dapo", token_advantages=True, tool_mask=True),
    dict(old=True, loss_type="dr_grpo"),
    dict(old=True, loss_type="dr_grpo", beta=0.04, delta=1.5),
    dict(loss_type="dr_grpo", beta=0.04),
    dict(loss_type="cispo", epsilon_high=5.0),
    dict(old=True, loss_type="cispo", epsilon_high=1.3),
    dict(old=True, loss_type="cispo", epsilon_high=1.3, beta=0.04, weights=True),
    dict(old=True, loss_type="cispo", epsilon_high=1.3, num_items=True),
]
SEQUENCE = [
    dict(),
    dict(old=True),
    dict(old=True, epsilon_low=3e-2, epsilon_high=4e-2),
    dict(old=True, token_advantages=True),
    dict(old=True, beta=0.04, weights=True),
    dict(old=True, beta=0.04, use_bias_correction_kl=True),
    dict(old=True, delta=1.05, beta=0.04, tool_mask=True),
    dict(old=True, loss_type="dapo", beta=0.04),
    dict(old=True, loss_type="dr_grpo", epsilon_low=3e-2),
    dict(old=True, loss_type="cispo", epsilon_high=1.02, beta=0.04),
]
CASES += [dict(importance_sampling_level="sequence", **case) for case in SEQUENCE]


def inputs():
    """Ragged rows, one of them empty; log-ratios wide enough for every branch."""
    rng = np.random.default_rng(0)
    lengths = np.array([7, 5, 1, 0, 6, 3])
    mask = (np.arange(T) < lengths[:, None]).astype(np.int64)
    tool_mask = (rng.random((B, T)) < 0.7).astype(np.int64)
    logps = -rng.exponential(1.0, (B, T))
    difference = rng.normal(0, 0.4, (B, T)) + rng.normal(0, 0.2, (B, 1))
    return dict(
        logps=logps,
        old_logps=logps - difference,
        ref_logps=logps + rng.normal(0, 0.5, (B, T)),
        advantages=np.array([1.3, -0.7, 0.4, 0.9, -1.1, 0.0]),
        token_advantages=rng.normal(0, 1, (B, T)),
        weights=np.minimum(np.exp(rng.normal(0, 0.5, (B, T))), 2.0),
        mask=mask,
        tool_mask=tool_mask,
    )


def trl_loss(arrays, case):
    import torch  # pyrefly: ignore[missing-import]
    from trl import GRPOTrainer  # pyrefly: ignore[missing-import]

    case = {**DEFAULTS, **case}
    tensors = {name: torch.tensor(x) for name, x in arrays.items()}
    leaf = tensors["logps"].clone().requires_grad_()
    loss_type = case["loss_type"]
    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__.update(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, leaf * 0, None),
        loss_type=loss_type,
        importance_sampling_level=case["importance_sampling_level"],
        beta=case["beta"],
        epsilon_low=case.get("epsilon_low", 0.2),
        epsilon_high=case.get("epsilon_high", 0.2),
        use_vllm=case.get("weights", False),
        vllm_importance_sampling_correction=case.get("weights", False),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x
        ),
        args=types.SimpleNamespace(
            delta=case.get("delta"),
            use_bias_correction_kl=case.get("use_bias_correction_kl", False),
            steps_per_generation=1,
        ),
        _metrics={"train": collections.defaultdict(list)},
    )
    mask = tensors["mask"]
    batch = dict(
        prompt_ids=torch.zeros(B, 1, dtype=torch.long),
        prompt_mask=torch.ones(B, 1, dtype=torch.long),
        completion_ids=torch.zeros(B, T, dtype=torch.long),
        completion_mask=mask,
        advantages=tensors[
            "token_advantages" if case.get("token_advantages") else "advantages"
        ],
        ref_per_token_logps=tensors["ref_logps"],
        importance_sampling_ratio=tensors["weights"],
    )
    if case.get("old"):
        batch["old_per_token_logps"] = tensors["old_logps"]
    if case.get("tool_mask"):
        batch["tool_mask"] = tensors["tool_mask"]
        mask = mask * tensors["tool_mask"]
    items = NUM_ITEMS if case.get("num_items") else int(mask.sum())
    batch["num_items_in_batch"] = torch.tensor(items)
    loss = trainer._compute_loss(None, batch)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    kept = ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean")
    metrics = {name: metrics[name] for name in kept if name in metrics}
    return float(loss.detach()), leaf.grad.numpy(), metrics


def trl_advantages(rewards, group_size, scale):
    """The lines of `_generate_and_score_completions` (sum_then_normalize) on `nanstd`.

    They stand in the middle of a 500-line method, so they are repeated, not called.
    """
    import torch  # pyrefly: ignore[missing-import]
    from trl.trainer.utils import nanstd  # pyrefly: ignore[missing-import]

    r = torch.tensor(rewards)
    groups = r.view(-1, group_size)
    advantages = r - torch.nanmean(groups, dim=1).repeat_interleave(group_size)
    if scale == "group":
        std = nanstd(groups, dim=1).repeat_interleave(group_size)
        advantages = advantages / (std + 1e-4)
    elif scale == "batch":
        advantages = advantages / (nanstd(r) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).numpy()


def main():
    arrays = inputs()
    results = [trl_loss(arrays, case) for case in CASES]
    rewards = np.random.default_rng(1).choice([0.0, 0.1, 1.0, 1.1], 24)
    rewards[[5, 17, 18]] = np.nan
    np.savez(
        pathlib.Path(__file__).with_suffix(".npz"),
        **arrays,
        cases=json.dumps([{**DEFAULTS, **case} for case in CASES]),
        loss=np.array([loss for loss, _, _ in results]),
        gradient=np.stack([gradient for _, gradient, _ in results]),
        metrics=json.dumps([metrics for _, _, metrics in results]),
        max_length=MAX_LENGTH,
        num_items=NUM_ITEMS,
        rewards=rewards,
        **{
            f"advantages_{scale}": trl_advantages(rewards, 6, scale)
            for scale in ("group", "batch", "none")
        },
    )


if __name__ == "__main__":
    main()
