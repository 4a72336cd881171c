"""What a step runs on the devices: its compiled programs and the batch they take.

In: a config, a model, the shardings of its state, a mesh. Out: `Programs`, and
`Layout`, which packs outputs into the one shape that a run has. `rl.py` runs them, and
`plan` compiles them for devices that are not there.

Axes: A micro-batches, B rows, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config, generations
from grpo_jax.distributed import sharding
from grpo_jax.environments.tool_rollouts import most_tokens
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.objectives import (
    Objective,
    dpo_objective,
    grpo_objective,
    ppo_objective,
    sft_objective,
)
from grpo_jax.training.packing import Batch, Sample, fitting_length, pack
from grpo_jax.training.reward_model.scoring import make_reward_scorer
from grpo_jax.training.train_step import (
    has_advantages,
    has_tokens,
    make_scorer,
    make_step,
)


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a step runs on the devices, beside the sampler; all compiled."""

    update: Any  # (state, None, batch) → (state, metrics)
    score: Any  # (parameters, batch) → log π of the targets [A, B, T]
    value: Any  # (critic, batch) → V(s_t) [A, B, T]


def make_programs(
    config: Config,
    model: Decoder,
    transformation: optax.GradientTransformation,
    shardings: Any,
) -> Programs:
    every = teaches_all(config)
    update = make_step(
        make_objective(config, model),
        transformation,
        has_signal=has_tokens if every else has_advantages,
        state_shardings=shardings,
    )
    score = make_scorer(model, temperature=config.temperature)
    return Programs(update, score, make_reward_scorer(RewardModel(model)))


def teaches_all(config: Config) -> bool:
    """Whether an output whose advantages are all 0 has a gradient too, or may have none
    that are: a KL term in the reward differs from token to token."""
    own, loss = config.own(), METHODS[config.method].loss
    return bool(own.get("kl_coef") or own.get("entropy_coef") or loss in ("ppo", "dpo"))


def make_objective(config: Config, model: Decoder) -> Objective:
    """The loss of the method's row, on the run's model."""
    own, temperature = config.own(), config.temperature
    loss = METHODS[config.method].loss
    if loss == "sft":
        return sft_objective(model, temperature=temperature, aggregate=own["aggregate"])
    if loss == "dpo":
        return dpo_objective(
            model,
            temperature=temperature,
            beta=own["dpo_beta"],
            length_normalized=own["length_normalized"],
        )
    options = loss_options(config)
    if loss == "ppo":
        del options["kl_coef"]  # it is in the reward
        return ppo_objective(
            model,
            RewardModel(model),
            value_clip=own["value_clip"],
            temperature=temperature,
            **options,
        )
    return grpo_objective(model, temperature=temperature, **options)


def loss_options(config: Config) -> dict[str, Any]:
    """What the method's row, and the config's own fields, ask of `grpo_loss`."""
    own = config.own()
    names = ("clip_low", "clip_high", "aggregate", "entropy_coef", "importance_cap")
    names += ("delta", "kl_estimator", "importance", "surrogate", "kl_coef")
    options = {name: own[name] for name in names if name in own}
    if METHODS[config.method].kl == "reward":
        options["kl_coef"] = 0.0
    if own["max_staleness"] and own["importance_cap"] is None:
        options["importance_cap"] = 2.0
    if own["aggregate"] == "constant":
        options["max_length"] = config.max_new_tokens * max(1, generations(config))
    return options


class Layout:
    """Samples → one packed batch on the mesh, of the run's one shape or few shapes.

    Pairs are laid out together; they then have a row of twice the length.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        pairs = METHODS[config.method].coefficient == "pairs"
        self.together = together = 2 if pairs else 1
        longest = most_tokens(generations(config), config.max_new_tokens)
        longest += config.data.max_prompt_tokens
        self.length = together * (config.optimizer.row_length or longest)
        rows = max(1, config.optimizer.micro_rows // together)
        self.rows = rows * sharding.rows_multiple(mesh)
        outputs = config.questions_per_step * config.group_size
        self.capacity = -(-outputs // (together * self.rows))
        self.choices = config.optimizer.row_lengths
        self.mesh = mesh

    def __call__(
        self, samples: Sequence[Sample], of: Sequence[Sample] | None = None
    ) -> Batch:
        return sharding.batch_placer(self.mesh)(self.pack(samples, of))

    def pack(
        self, samples: Sequence[Sample], of: Sequence[Sample] | None = None
    ) -> Batch:
        """The batch on the host."""
        layout: dict[str, Any] = dict(
            rows=self.rows, share_prompts=True, together=self.together
        )
        length = self.length
        if self.choices > 1 and samples:
            length = fitting_length(
                samples, longest=length, choices=self.choices, **layout
            )
        batch = pack(samples, length=length, of=of, **layout)
        return batch.with_capacity(self.capacity)
