"""Checks that a run can start with a config.

Every field is checked for itself, and then the combinations that would fail, or be
ignored, later. An error is one line that names the field.
"""

import dataclasses
from typing import Any, get_args, get_type_hints

from grpo_jax.algorithms.methods import METHOD_FIELDS, METHODS
from grpo_jax.arguments import check_value
from grpo_jax.config import (
    Config,
    flatten_config,
    lora_targets,
    reward_names,
    reward_weights,
    set_names,
    tool_generations,
)
from grpo_jax.config_fields import COUNT
from grpo_jax.errors import GrpoError


def validate_config(config: Config) -> Config:
    """Returns the config if a run can start with it.

    Raises:
      GrpoError: a field, which the message names, cannot be used.

    >>> validate_config(Config(group_size=1))
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.group_size: 1 output a question has no group...
    """
    check_fields(config)
    flat = flatten_config(config)
    for name in METHOD_FIELDS:
        if flat[name] is not None and name not in METHODS[config.method].fields:
            raise GrpoError(
                f"config.{name}: method {config.method} would ignore it; leave it out"
            )
    _validate_method(config)
    if config.sft_steps and not config.data.sft:
        raise GrpoError("config.data.sft: sft_steps is set; name the worked examples")
    model = config.model
    if not model.path:
        for name in ("layers", "width", "heads", "ffn"):
            if not flat[f"model.{name}"]:
                raise GrpoError(
                    f"config.model.{name}: 0; a new model needs it (or set model.path)"
                )
        if model.width % (2 * model.heads):
            raise GrpoError(
                f"config.model.width: {model.width} is not a multiple of twice the "
                f"heads, {model.heads}"
            )
        if model.heads % (model.kv_heads or model.heads):
            raise GrpoError(
                f"config.model.kv_heads: {model.kv_heads} does not divide the heads, "
                f"{model.heads}"
            )
    _validate_sizes(config)
    lora_targets(config)
    if not config.sft_steps and not model.path:
        raise GrpoError(
            "config.sft_steps: 0, so RL would start from random weights; set it, or "
            "model.path"
        )
    names, weights = reward_names(config), reward_weights(config)
    if len(names) != len(weights):
        raise GrpoError(
            f"config.rewards.weights: {len(weights)} for {len(names)} functions"
        )
    if config.eval.every and not set_names(config):
        raise GrpoError(
            f"config.eval.every: {config.eval.every}, but data.eval names no set; name "
            "one, or leave eval.every out"
        )
    return config


def _validate_sizes(config: Config) -> None:
    """Checks products of fields, and fields that bound each other."""
    outputs = config.questions_per_step * config.group_size
    tokens = outputs * config.max_new_tokens * max(1, tool_generations(config))
    if tokens > COUNT:
        raise GrpoError(
            f"config.max_new_tokens: {config.max_new_tokens} for each of {outputs} "
            f"outputs a step are more than {COUNT:,} tokens; lower it, "
            "questions_per_step or group_size"
        )
    values, steps = config.method_values(), config.rl_steps
    if steps * values.get("updates_per_rollout", 1) > COUNT:
        raise GrpoError(
            f"config.updates_per_rollout: more than {COUNT:,} updates in {steps} steps"
        )
    if steps and values.get("iterations", 1) > steps:
        raise GrpoError(
            f"config.iterations: {values['iterations']} do not fit into {steps} "
            "rl_steps; an iteration has one at least"
        )
    mesh = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if 0 in mesh or mesh.count(-1) > 1:
        raise GrpoError(
            f"config.mesh: data, fsdp and tensor are {mesh}; each is 1 or more, "
            "and one may be -1"
        )


def check_fields(part: Any, prefix: str = "") -> None:
    """Checks each field of a config for itself.

    Raises:
      GrpoError: a field's type or value is not allowed.
    """
    hints = get_type_hints(type(part))
    for field in dataclasses.fields(part):
        name, value = prefix + field.name, getattr(part, field.name)
        kind = hints[field.name]
        if not dataclasses.is_dataclass(kind):
            kinds = get_args(kind) or (kind,)
            check_value(f"config.{name}", value, kinds, **field.metadata)
        elif isinstance(value, kind):
            check_fields(value, f"{name}.")
        else:
            raise GrpoError(f"config.{name}: {value!r} is not a {kind.__name__}")


def _validate_method(config: Config) -> None:
    """Checks what depends on the method."""
    method = METHODS[config.method]
    if not method.reward and config.rewards.functions:
        reason = "learns from worked examples"
        if method.coefficient == "process":
            reason = "takes its rewards from the process reward model"
        raise GrpoError(
            f"config.rewards.functions: method {config.method} {reason}; leave it out"
        )
    values = config.method_values()
    groups = method.coefficient in ("outcome", "process", "pairs")
    if groups and values.get("advantage_baseline") != "batch" and config.group_size < 2:
        raise GrpoError(
            f"config.group_size: {config.group_size} output a question has no group to "
            "be compared with; 2 or more"
        )
    if values.get("surrogate") == "cispo" and values["clip_high"] is None:
        raise GrpoError("config.clip_high: surrogate cispo needs it, the ratio's bound")
    if method.loss == "sft" and config.aggregate == "constant":
        raise GrpoError("config.aggregate: 'constant' is for GRPO's and PPO's losses")
    needs_model = method.coefficient == "process" or "model" in reward_names(config)
    r = config.reward_model
    makes_labels = not r.labels or values.get("iterations", 1) > 1
    if needs_model and makes_labels and r.questions * r.samples < r.batch_size:
        raise GrpoError(
            f"config.reward_model.questions: {r.questions} with {r.samples} output(s) "
            f"each are fewer than reward_model.batch_size, {r.batch_size}"
        )
    if tool_generations(config) and needs_model:
        raise GrpoError(
            "config.tools.generations: a reward model is trained on outputs without "
            "programs; set it to 0, or take a method and rewards without the model"
        )
    buffer = values.get("overlong_buffer", 0)
    longest = config.max_new_tokens * max(1, tool_generations(config))
    if buffer > longest:
        raise GrpoError(
            f"config.overlong_buffer: {buffer} is more than max_new_tokens allows, "
            f"{longest}"
        )
