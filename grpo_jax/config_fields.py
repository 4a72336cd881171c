"""Fields of a config with choices and bounds, and the messages for wrong ones.

`one_of` and `number` make dataclass fields, and `check_value` checks a value. For a
name that is no field, `other_name` suggests the one that was probably meant, from the
names in other libraries or from the spelling.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from grpo_jax.errors import GrpoError

TOKENS = 2**20  # the most tokens of a sequence; longer ones fit in no memory
COUNT = 2**31 - 1  # the most steps, which are counted in 32 bits
ROWS = 2**20  # the most rows of a batch
LONGEST = 10**6  # the longest time-out in seconds: 11 days
COEFFICIENT = 1e6  # the largest coefficient of a loss in float32


def one_of(*choices: str | int, default: Any = ...) -> Any:
    """Returns a field with these choices; the first is the default if none is given."""
    default = choices[0] if default is ... else default
    return dataclasses.field(default=default, metadata={"choices": choices})


def number(
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


def check_value(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> None:
    """Checks that a value has the field's type and is within its choices and bounds.

    Args:
      name: the field's dotted name.
      value: its value.
      kind: its type, such as int or float | None.
      metadata: the choices or bounds of `one_of` or `number`.

    Raises:
      GrpoError: it is not.

    >>> check_value("clip_low", 0.0, float, {"above": 0, "most": 1})
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.clip_low: 0.0 is out of range; above 0 and at ...
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return
    if not _is_of(value, kinds):
        wanted = " or ".join(_KINDS[k] for k in kinds)
        raise GrpoError(
            f"config.{name}: {_short(value)} is {type(value).__name__}; {wanted} is "
            "needed"
        )
    if isinstance(value, float) and not math.isfinite(value):
        said = "NaN" if math.isnan(value) else "infinity"
        raise GrpoError(f"config.{name}: {said} is not a value; give a finite number")
    if choices := metadata.get("choices"):
        if value not in choices:
            known = [str(choice) for choice in choices]
            near = difflib.get_close_matches(str(value), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            listed = ", ".join(repr(choice) for choice in choices)
            raise GrpoError(
                f"config.{name}: {_short(value)} is not one of {listed}{hint}"
            )
        return
    if not _is_within(value, metadata):
        raise GrpoError(
            f"config.{name}: {_short(value)} is out of range; {_describe(metadata)} is "
            "needed"
        )


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    types.NoneType: "None",
}


def _is_of(value: Any, kinds: tuple[Any, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def _is_within(value: Any, bounds: Mapping[str, Any]) -> bool:
    tests = {
        "least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    return all(test(bounds[name]) for name, test in tests.items() if name in bounds)


def _describe(bounds: Mapping[str, Any]) -> str:
    words = {"least": "or more", "above": "above", "most": "at most", "below": "below"}
    said = []
    for name, word in words.items():
        if name in bounds:
            bound = f"{bounds[name]:,}" if bounds[name] >= 1e4 else f"{bounds[name]}"
            said.append(f"{bound} {word}" if name == "least" else f"{word} {bound}")
    return " and ".join(said)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# -- names that are no fields ----------------------------------------------------------

# Names in TRL, verl, OpenRLHF and papers → the field of this package.
OTHER_NAMES: dict[str, str] = {
    # the loss
    "beta": "kl_coef",
    "kl_beta": "kl_coef",
    "kl_coeff": "kl_coef",
    "kl_loss_coef": "kl_coef",
    "init_kl_coef": "kl_coef",
    "kl_loss_type": "kl_estimator",
    "kl_penalty": "kl_estimator",
    "epsilon": "clip_low",
    "eps_clip": "clip_low",
    "cliprange": "clip_low",
    "clip_range": "clip_low",
    "clip_ratio": "clip_low",
    "clip_ratio_low": "clip_low",
    "epsilon_low": "clip_low",
    "epsilon_high": "clip_high",
    "clip_ratio_high": "clip_high",
    "clip_ratio_c": "delta",
    "entropy_coeff": "entropy_coef",
    "loss_type": "aggregate",
    "loss_agg_mode": "aggregate",
    "importance_sampling_level": "importance",
    "vllm_importance_sampling_cap": "importance_cap",
    "tis_imp_ratio_cap": "importance_cap",
    "num_iterations": "updates_per_rollout",
    "ppo_epochs": "updates_per_rollout",
    "num_ppo_epochs": "updates_per_rollout",
    "mu": "updates_per_rollout",
    "adv_estimator": "method",
    "advantage_estimator": "method",
    "algorithm": "method",
    "scale_rewards": "advantage_scale",
    "norm_adv_by_std_in_grpo": "advantage_scale",
    "gamma": "gae_gamma",
    "lam": "gae_lambda",
    "lambd": "gae_lambda",
    "cliprange_value": "value_clip",
    "critic_learning_rate": "value_learning_rate",
    # outputs
    "num_generations": "group_size",
    "n_samples_per_prompt": "group_size",
    "num_return_sequences": "group_size",
    "n": "group_size",
    "g": "group_size",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "response_length": "max_new_tokens",
    "generate_max_len": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "mask_truncated_completions": "mask_truncated",
    "overlong_buffer_len": "overlong_buffer",
    "filter_groups": "dynamic_sampling",
    # rewards
    "reward_funcs": "rewards.functions",
    "reward_functions": "rewards.functions",
    "reward_weights": "rewards.weights",
    # batches, steps and the optimiser
    "lr": "learning_rate",
    "actor_learning_rate": "learning_rate",
    "batch_size": "questions_per_step",
    "train_batch_size": "questions_per_step",
    "rollout_batch_size": "questions_per_step",
    "generation_batch_size": "questions_per_step",
    "per_device_train_batch_size": "questions_per_step",
    "micro_batch_size": "optimizer.micro_rows",
    "micro_train_batch_size": "optimizer.micro_rows",
    "ppo_micro_batch_size_per_gpu": "optimizer.micro_rows",
    "gradient_accumulation_steps": "optimizer.micro_rows",
    "max_steps": "rl_steps",
    "num_steps": "rl_steps",
    "steps": "rl_steps",
    "epochs": "rl_steps",
    "num_train_epochs": "rl_steps",
    "total_epochs": "rl_steps",
    "total_training_steps": "rl_steps",
    "lr_scheduler_type": "optimizer.schedule",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "beta1": "optimizer.b1",
    "beta2": "optimizer.b2",
    "grad_clip": "optimizer.max_grad_norm",
    "save_steps": "checkpoint_every",
    "save_freq": "checkpoint_every",
    "save_total_limit": "checkpoints_kept",
    "eval_steps": "eval.every",
    "test_freq": "eval.every",
    # the model, the data and the devices
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "pretrain": "model.path",
    "bf16": "model.dtype",
    "gradient_checkpointing": "model.remat",
    "lora_r": "model.lora_rank",
    "lora_target_modules": "model.lora_targets",
    "target_modules": "model.lora_targets",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_files": "data.train",
    "max_prompt_length": "data.max_prompt_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "chat_template": "data.template",
    "tensor_parallel_size": "mesh.decode_tensor",
    "tensor_model_parallel_size": "mesh.decode_tensor",
    "vllm_tensor_parallel_size": "mesh.decode_tensor",
    "fsdp_size": "mesh.fsdp",
}
_FILTERS = (
    "training samples from the whole distribution, whose probabilities the loss needs"
)
_REMARKS: dict[str, str] = {
    "top_p": _FILTERS,
    "top_k": _FILTERS,
    "min_p": _FILTERS,
    "repetition_penalty": _FILTERS,
    "system": "give rows chat `messages` that begin with a system message",
    "system_prompt": "give rows chat `messages` that begin with a system message",
    "output_dir": "name the folder by --workdir",
    "use_vllm": "the sampler is part of the program",
    "logging_steps": "every step is written down",
}


def other_name(name: str, known: list[str]) -> str:
    """Returns a suggestion for a name that is no field; "" if there is none.

    Args:
      name: dotted, such as "optimizer.lr".
      known: the dotted names of all fields.

    >>> other_name("optimizer.lr", ["learning_rate", "optimizer.b1"])
    '; did you mean config.learning_rate?'
    """
    section, _, last = name.rpartition(".")
    typed = last.lower().replace("-", "_")
    if typed in _REMARKS:
        return f"; {_REMARKS[typed]}"
    if target := OTHER_NAMES.get(typed, typed if section else ""):
        own = f"{section}.{target.rpartition('.')[2]}"  # sft.lr is sft.learning_rate
        for meant in (own, target):
            if meant in known:
                return f"; did you mean config.{meant}?"
    if near := difflib.get_close_matches(name, known, 1, 0.5):
        return f"; did you mean config.{near[0]}?"
    return ""
