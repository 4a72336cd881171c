"""Fields of a config with choices and bounds.

`choice_field` and `number_field` make dataclass fields, whose metadata are the
arguments of `arguments.check_value`. For a name that is no field, `suggest_name` finds
the one that was probably meant, by its names in other libraries or by spelling.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from grpo_jax.arguments import MOST, MOST_ROWS

TOKENS = MOST_ROWS  # the most tokens of a sequence; longer ones fit in no memory
ROWS = MOST_ROWS  # the most rows of a batch
COUNT = MOST  # the most steps
COEFFICIENT = 1e6  # the largest coefficient of a loss in float32


def choice_field(*choices: str | int, default: Any = ...) -> Any:
    """Returns a field with these choices; the first is the default if none is given."""
    default = choices[0] if default is ... else default
    return dataclasses.field(default=default, metadata={"choices": choices})


def number_field(
    default: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Returns a field of numbers in a range.

    Args:
      default: the field's default.
      least: the smallest value.
      most: the largest value.
      above: a bound that values exceed.
      below: a bound that values stay under.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata=given)


# -- names that are no fields ----------------------------------------------------------

# A field of this package → its names in TRL, verl, OpenRLHF and papers.
_OTHER_NAMES = {
    "kl_coef": "beta kl_beta kl_coeff kl_loss_coef init_kl_coef",
    "kl_estimator": "kl_loss_type kl_penalty",
    "clip_low": "epsilon eps_clip cliprange clip_range clip_ratio clip_ratio_low"
    " epsilon_low",
    "clip_high": "epsilon_high clip_ratio_high",
    "delta": "clip_ratio_c",
    "entropy_coef": "entropy_coeff",
    "aggregate": "loss_type loss_agg_mode",
    "importance": "importance_sampling_level",
    "importance_cap": "vllm_importance_sampling_cap tis_imp_ratio_cap",
    "updates_per_rollout": "num_iterations ppo_epochs num_ppo_epochs mu",
    "method": "adv_estimator advantage_estimator algorithm",
    "advantage_scale": "scale_rewards norm_adv_by_std_in_grpo",
    "gae_gamma": "gamma",
    "gae_lambda": "lam lambd",
    "value_clip": "cliprange_value",
    "value_learning_rate": "critic_learning_rate",
    "group_size": "num_generations n_samples_per_prompt num_return_sequences n g",
    "max_new_tokens": "max_completion_length max_response_length response_length"
    " generate_max_len max_tokens max_length",
    "mask_truncated": "mask_truncated_completions",
    "overlong_buffer": "overlong_buffer_len",
    "dynamic_sampling": "filter_groups",
    "rewards.functions": "reward_funcs reward_functions",
    "rewards.weights": "reward_weights",
    "learning_rate": "lr actor_learning_rate",
    "questions_per_step": "batch_size train_batch_size rollout_batch_size"
    " generation_batch_size per_device_train_batch_size",
    "optimizer.micro_rows": "micro_batch_size micro_train_batch_size"
    " ppo_micro_batch_size_per_gpu gradient_accumulation_steps",
    "rl_steps": "max_steps num_steps steps epochs num_train_epochs total_epochs"
    " total_training_steps",
    "optimizer.schedule": "lr_scheduler_type",
    "optimizer.b1": "adam_beta1 beta1",
    "optimizer.b2": "adam_beta2 beta2",
    "optimizer.max_grad_norm": "grad_clip",
    "checkpoint_every": "save_steps save_freq",
    "checkpoints_kept": "save_total_limit",
    "eval.every": "eval_steps test_freq",
    "model.path": "model_name model_name_or_path pretrain",
    "model.dtype": "bf16",
    "model.remat": "gradient_checkpointing",
    "model.lora_rank": "lora_r",
    "model.lora_targets": "lora_target_modules target_modules",
    "data.train": "dataset dataset_name train_files",
    "data.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "data.template": "chat_template",
    "mesh.decode_tensor": "tensor_parallel_size tensor_model_parallel_size"
    " vllm_tensor_parallel_size",
    "mesh.fsdp": "fsdp_size",
}
OTHER_NAMES = {
    other: name for name, others in _OTHER_NAMES.items() for other in others.split()
}
_REMARKS = {
    **dict.fromkeys(
        ("top_p", "top_k", "min_p", "repetition_penalty"),
        "training samples from the whole distribution, whose probabilities the loss "
        "needs",
    ),
    **dict.fromkeys(
        ("system", "system_prompt"),
        "give rows chat `messages` that begin with a system message",
    ),
    "output_dir": "name the folder by --workdir",
    "use_vllm": "the sampler is part of the program",
    "logging_steps": "every step is written down",
}


def suggest_name(name: str, known: list[str]) -> str:
    """Returns a suggestion for a name that is no field; "" if there is none.

    Args:
      name: dotted, such as "optimizer.lr".
      known: the dotted names of all fields.

    >>> suggest_name("optimizer.lr", ["learning_rate", "optimizer.b1"])
    '; did you mean config.learning_rate?'
    """
    section, _, last = name.rpartition(".")
    typed = last.lower().replace("-", "_")
    if typed in _REMARKS:
        return f"; {_REMARKS[typed]}"
    if target := OTHER_NAMES.get(typed, typed if section else ""):
        inner = f"{section}.{target.rpartition('.')[2]}"  # sft.lr: sft.learning_rate
        for meant in (inner, target):
            if meant in known:
                return f"; did you mean config.{meant}?"
    if near := difflib.get_close_matches(name, known, 1, 0.5):
        return f"; did you mean config.{near[0]}?"
    return ""
