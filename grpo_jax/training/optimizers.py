"""The optimisers of the stages, as a config sets them.

Each is AdamW with global-norm clipping and a learning-rate schedule; PPO's critic has
one of its own beside the policy's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config, OptimizerSettings
from grpo_jax.training.train_step import make_optimizer


def adamw(
    settings: OptimizerSettings,
    learning_rate: float,
    *,
    steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns a stage's optimiser and schedule.

    Args:
      settings: what all stages of a run share.
      learning_rate: the stage's peak rate.
      steps: updates of the stage.
      schedule: "constant", "linear" or "cosine".
      warmup_steps: updates until the peak rate is reached.
    """
    return make_optimizer(
        learning_rate,
        steps=steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        master=settings.master,
    )


def sft_optimizer(config: Config) -> tuple[optax.GradientTransformation, Any]:
    """Returns the Instruct stage's (optimiser, schedule)."""
    return adamw(
        config.optimizer,
        config.sft.learning_rate,
        steps=config.sft_steps,
        schedule=config.sft.schedule,
        warmup_steps=config.sft.warmup_steps,
    )


def rl_optimizer(config: Config) -> tuple[optax.GradientTransformation, Any]:
    """Returns the RL stage's (optimiser, schedule of the policy).

    PPO's critic has its own optimiser in it, with its own rate and its own clipping.
    """
    o, own = config.optimizer, config.own()
    make = functools.partial(
        adamw,
        o,
        steps=config.rl_steps * own.get("updates_per_rollout", 1),
        schedule=o.schedule,
        warmup_steps=o.warmup_steps,
    )
    policy, rate = make(config.learning_rate)
    if METHODS[config.method].coefficient != "critic":
        return policy, rate
    critic, _ = make(own["value_learning_rate"] or 10 * config.learning_rate)

    def owner(params):
        labels = {
            name: jax.tree.map(lambda _: "policy", x) for name, x in params.items()
        }
        return labels | {"value": jax.tree.map(lambda _: "critic", params["value"])}

    return optax.partition({"policy": policy, "critic": critic}, owner), rate


def stage_optimizer(
    stage: str, config: Config
) -> tuple[optax.GradientTransformation, Any]:
    """Returns (optimiser, schedule) of a stage, "sft" or "rl"."""
    return {"sft": sft_optimizer, "rl": rl_optimizer}[stage](config)
