"""What a config may hold: choices, bounds, and what does not go together.

In: a `Config`. Out: the same, or one line that names the field (faults 1 to 6).
"""

import difflib
from typing import Any

from grpo_jax.config import (
    Config,
    flatten,
    generations,
    lora_targets,
    reward_names,
    reward_weights,
)
from grpo_jax.errors import GrpoError
from grpo_jax.methods import METHODS, OWN_FIELDS

_CHOICES: dict[str, tuple[str | int, ...]] = {
    "method": tuple(METHODS),
    "kl_estimator": ("k1", "k2", "k3", "k3_unbiased"),
    "aggregate": ("sequence_mean", "token_mean", "constant"),
    "importance": ("token", "sequence"),
    "surrogate": ("clip", "cispo"),
    "advantage_scale": ("group", "batch", "none"),
    "advantage_baseline": ("mean", "leave_one_out", "batch"),
    "reward_normalization": ("sum", "each"),
    "max_staleness": (0, 1),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.cache_dtype": ("", "float32", "bfloat16"),
    "model.remat": ("none", "matmuls", "ffn", "full", "offload"),
    "model.reference_memory": ("device", "host"),
    "data.template": ("chat", "deepseekmath", "plain"),
    "data.instruction": ("cot", "tool", "none"),
    "sft.schedule": ("constant", "linear", "cosine"),
    "sft.aggregate": ("sequence_mean", "token_mean"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
}
# name → the least value allowed, and whether that value itself is
_BOUNDS: dict[str, tuple[float, bool]] = {
    "sft_steps": (0, True),
    "rl_steps": (0, True),
    "questions_per_step": (1, True),
    "group_size": (1, True),
    "max_new_tokens": (1, True),
    "learning_rate": (0, False),
    "temperature": (0, False),
    "kl_coef": (0, True),
    "clip_low": (0, False),
    "clip_high": (0, False),
    "delta": (1, False),
    "updates_per_rollout": (1, True),
    "entropy_coef": (0, True),
    "importance_cap": (0, False),
    "overlong_buffer": (0, True),
    "dynamic_sampling": (0, True),
    "dpo_beta": (0, False),
    "gae_gamma": (0, True),
    "gae_lambda": (0, True),
    "value_clip": (0, False),
    "value_learning_rate": (0, False),
    "iterations": (1, True),
    "replay": (0, True),
    "checkpoint_every": (1, True),
    "checkpoints_kept": (1, True),
    "model.vocab_size": (0, True),
    "model.layers": (0, True),
    "model.width": (0, True),
    "model.heads": (0, True),
    "model.kv_heads": (0, True),
    "model.lora_rank": (0, True),
    "model.lora_alpha": (0, False),
    "model.ffn": (0, True),
    "data.max_prompt_tokens": (1, True),
    "sft.learning_rate": (0, False),
    "sft.warmup_steps": (0, True),
    "sft.batch_size": (1, True),
    "sft.batch_rows": (0, True),
    "sft.row_length": (2, True),
    "sft.micro_rows": (1, True),
    "optimizer.warmup_steps": (0, True),
    "optimizer.b1": (0, True),
    "optimizer.b2": (0, True),
    "optimizer.weight_decay": (0, True),
    "optimizer.max_grad_norm": (0, False),
    "optimizer.micro_rows": (1, True),
    "optimizer.row_length": (0, True),
    "optimizer.row_lengths": (1, True),
    "optimizer.max_skipped": (1, True),
    "optimizer.max_sampling_gap": (0, False),
    "rewards.timeout": (0, False),
    "tools.generations": (0, True),
    "tools.timeout": (0, False),
    "tools.rows": (0, True),
    "reward_model.questions": (1, True),
    "reward_model.samples": (1, True),
    "reward_model.completions": (1, True),
    "reward_model.steps": (1, True),
    "reward_model.batch_size": (1, True),
    "reward_model.learning_rate": (0, False),
    "mesh.decode_tensor": (0, True),
    "mesh.slots": (0, True),
    "eval.questions": (0, True),
    "eval.samples": (0, True),
    "eval.temperature": (0, False),
    "eval.batch": (1, True),
    "eval.every": (0, True),
}


def validate(config: Config) -> Config:
    """The config itself, if a run can start with it.

    >>> validate(Config(group_size=1))
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.group_size: 1 output a question has no group...
    """
    flat = check_fields(config)
    for name in OWN_FIELDS:
        if flat[name] is not None and name not in METHODS[config.method].fields:
            raise GrpoError(
                f"config.{name}: method {config.method} would ignore it; leave it out"
            )
    _validate_method(config)
    if config.sft_steps and not config.data.sft:
        raise GrpoError("config.data.sft: sft_steps is set; name the worked examples")
    if not config.model.path:
        for name in ("layers", "width", "heads", "ffn"):
            if not flat[f"model.{name}"]:
                raise GrpoError(
                    f"config.model.{name}: 0; a new model needs it (or set model.path)"
                )
        if config.model.width % (2 * config.model.heads):
            raise GrpoError(
                f"config.model.width: {config.model.width} is not a multiple of twice "
                f"the heads, {config.model.heads}"
            )
    lora_targets(config)
    if not config.sft_steps and not config.model.path:
        raise GrpoError(
            "config.sft_steps: 0, so RL would start from random weights; set it, or "
            "model.path"
        )
    names, weights = reward_names(config), reward_weights(config)
    if len(names) != len(weights):
        raise GrpoError(
            f"config.rewards.weights: {len(weights)} for {len(names)} functions"
        )
    return config


def check_fields(config: Config) -> dict[str, Any]:
    """Each field for itself, as `flatten` gives them; raises `GrpoError` of one."""
    flat = flatten(config)
    for name, value in flat.items():
        if isinstance(value, float) and value != value:
            raise GrpoError(f"config.{name}: NaN is not a value")
    for name, choices in _CHOICES.items():
        if flat[name] is not None and flat[name] not in choices:
            known = [str(choice) for choice in choices]
            near = difflib.get_close_matches(str(flat[name]), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise GrpoError(
                f"config.{name}: {flat[name]!r} is not one of {', '.join(known)}{hint}"
            )
    for name, (least, allowed) in _BOUNDS.items():
        value = flat[name]
        if value is not None and (value < least or (value == least and not allowed)):
            bound = f"{least} or more" if allowed else f"above {least}"
            raise GrpoError(
                f"config.{name}: {value} is out of range; {bound} is needed"
            )
    return flat


def _validate_method(config: Config) -> None:
    """What only the method's row can tell."""
    method = METHODS[config.method]
    if not method.reward and config.rewards.functions:
        reason = "learns from worked examples"
        if method.coefficient == "process":
            reason = "takes its rewards from the process reward model"
        raise GrpoError(
            f"config.rewards.functions: method {config.method} {reason}; leave it out"
        )
    groups = method.coefficient in ("outcome", "process", "pairs")
    if "advantage_baseline" in method.fields:
        groups = config.of_method("advantage_baseline") != "batch"
    if groups and config.group_size < 2:
        raise GrpoError(
            f"config.group_size: {config.group_size} output a question has no group to "
            "be compared with; 2 or more"
        )
    if "surrogate" in method.fields and config.of_method("surrogate") == "cispo":
        if config.of_method("clip_high") is None:
            raise GrpoError(
                "config.clip_high: surrogate cispo needs it, the ratio's bound"
            )
    if method.loss == "sft" and config.aggregate == "constant":
        raise GrpoError("config.aggregate: 'constant' is for GRPO's and PPO's losses")
    judged = method.coefficient == "process" or "model" in reward_names(config)
    if generations(config) and judged:
        raise GrpoError(
            "config.tools.generations: a reward model is trained on outputs without "
            "programs; set it to 0, or take a method and rewards without the model"
        )
    has_buffer = "overlong_buffer" in method.fields
    buffer = config.of_method("overlong_buffer") if has_buffer else 0
    longest = config.max_new_tokens * max(1, generations(config))
    if buffer > longest:
        raise GrpoError(
            f"config.overlong_buffer: {buffer} is more than max_new_tokens allows, "
            f"{longest}"
        )
