"""Optimisers and learning-rate schedules: AdamW with clipping and master weights.

`make_optimizer` takes plain arguments. The functions after it build the optimiser of a
stage from its config; PPO's critic has its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.arguments import check_choice, check_number, check_whole
from grpo_jax.config import Config, OptimizerSettings
from grpo_jax.errors import GrpoError

_BELOW_1 = math.nextafter(1.0, 0.0)  # a decay of 1 would divide by 0


def make_optimizer(
    learning_rate: float,
    *,
    steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    master: bool = True,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns AdamW with global-norm clipping, and its learning-rate schedule.

    Args:
      learning_rate: the peak rate.
      steps: updates of the whole stage, including the warm-up.
      schedule: "constant", "linear" or "cosine"; the latter two fall to 0.
      warmup_steps: updates until the peak rate is reached.
      b1: decay of the first moment, below 1.
      b2: decay of the second moment, below 1.
      weight_decay: AdamW's decoupled decay.
      max_grad_norm: the bound on the gradient's norm; infinity does not clip.
      master: keep float32 copies of weights below float32, and their moments in
        float32. False keeps moments in the dtype of the weights.

    Returns:
      (the optimiser, the schedule: update → learning rate).

    Raises:
      GrpoError: an argument is out of range.
    """
    where = "make_optimizer"
    check_whole(where, least=0, steps=steps, warmup_steps=warmup_steps)
    check_number(where, learning_rate=learning_rate, weight_decay=weight_decay)
    check_number(where, most=_BELOW_1, b1=b1, b2=b2)
    check_choice(f"{where}: schedule", schedule, ("constant", "linear", "cosine"))
    if not max_grad_norm > 0:  # infinity clips nothing
        raise GrpoError(f"{where}: max_grad_norm = {max_grad_norm} is not above 0")
    decay = max(steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(learning_rate, decay),
    }[schedule]
    # Warm-up starts at 1/(w+1) of the rate: at 0 the first rollout would be wasted.
    first = learning_rate / (warmup_steps + 1)
    warmup = optax.linear_schedule(first, learning_rate, max(warmup_steps, 1))
    rate = optax.join_schedules([warmup, after], [warmup_steps])
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    if not master:
        adamw = keep_dtype(adamw)
    chain = optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)
    return (keep_master(chain) if master else chain), rate


def keep_dtype(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimiser with its moments in the dtype of the weights."""

    def update(gradients, state, params=None):
        gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)
        return inner.update(gradients, state, params)

    return optax.GradientTransformation(inner.init, update)  # type: ignore[bad-argument-type]


class MasterWeights(NamedTuple):
    """Optimiser state with float32 copies of weights too coarse for the updates."""

    weights: Any  # float32
    inner: Any  # the optimiser's state for the copies


def keep_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimiser on float32 master copies of the weights.

    The weights are set to the rounded copies after each update. bfloat16 has 8
    significant bits, so an update below 2^-9 of a weight would round to nothing, and so
    would a hundred of them. If all weights are float32, there are no copies.

    >>> optimizer = keep_master(optax.sgd(1.0))
    >>> weight = jnp.ones(1, jnp.bfloat16)
    >>> state = optimizer.init(weight)
    >>> for _ in range(8):
    ...     move, state = optimizer.update(jnp.array([-0.001]), state, weight)
    ...     weight = optax.apply_updates(weight, move)
    >>> weight.tolist(), (jnp.ones(1, jnp.bfloat16) + jnp.bfloat16(0.001)).tolist()
    ([1.0078125], [1.0])
    """

    def widen(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        if all(x.dtype == jnp.float32 for x in jax.tree.leaves(params)):
            return inner.init(params)
        weights = widen(params)
        return MasterWeights(weights, inner.init(weights))

    def update(gradients, state, params=None):
        if not isinstance(state, MasterWeights):
            return inner.update(gradients, state, params)
        moves, after = inner.update(gradients, state.inner, state.weights)
        weights = optax.apply_updates(state.weights, moves)
        moves = jax.tree.map(jnp.subtract, weights, widen(params))
        return moves, MasterWeights(weights, after)

    return optax.GradientTransformation(init, update)  # type: ignore[bad-argument-type]


def make_stage_optimizer(
    settings: OptimizerSettings, learning_rate: float, **options: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns a stage's optimiser and schedule.

    Args:
      settings: what all stages of a run share.
      learning_rate: the stage's peak rate.
      **options: steps, schedule and warmup_steps, as in `make_optimizer`.
    """
    names = ("b1", "b2", "weight_decay", "max_grad_norm", "master")
    shared = {name: getattr(settings, name) for name in names}
    return make_optimizer(learning_rate, **shared, **options)


def rl_optimizer(config: Config) -> tuple[optax.GradientTransformation, Any]:
    """Returns the RL stage's (optimiser, schedule of the policy).

    PPO's critic is part of it, with its own rate and clipping.
    """
    o, values = config.optimizer, config.method_values()
    steps = config.rl_steps * values.get("updates_per_rollout", 1)
    options = dict(steps=steps, schedule=o.schedule, warmup_steps=o.warmup_steps)
    policy, rate = make_stage_optimizer(o, config.learning_rate, **options)
    if METHODS[config.method].coefficient != "critic":
        return policy, rate
    critic_rate = values["value_learning_rate"] or 10 * config.learning_rate
    critic, _ = make_stage_optimizer(o, critic_rate, **options)

    def owner(params):
        return {name: "critic" if name == "value" else "policy" for name in params}

    return optax.partition({"policy": policy, "critic": critic}, owner), rate


def stage_optimizer(
    stage: str, config: Config
) -> tuple[optax.GradientTransformation, Any]:
    """Returns (optimiser, schedule) of a stage, "sft" or "rl"."""
    if stage == "rl":
        return rl_optimizer(config)
    return make_stage_optimizer(
        config.optimizer,
        config.sft.learning_rate,
        steps=config.sft_steps,
        schedule=config.sft.schedule,
        warmup_steps=config.sft.warmup_steps,
    )
