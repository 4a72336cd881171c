"""The compiled programs of an RL step, and the layout of the batch that they take.

`rl.py` runs them; `grpo_jax.plan` compiles them for hardware that need not be there.

Axes: A micro-batches, B rows, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config, tool_generations
from grpo_jax.distributed import sharding
from grpo_jax.environments.tool_rollouts import max_output_tokens
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.batch import Batch, Sample
from grpo_jax.training.objectives import (
    Objective,
    dpo_objective,
    grpo_objective,
    ppo_objective,
    sft_objective,
)
from grpo_jax.training.packing import fitting_length, pack
from grpo_jax.training.reward_model.scoring import make_reward_scorer
from grpo_jax.training.train_step import (
    has_advantages,
    has_tokens,
    make_scorer,
    make_step,
)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of an RL step, except the sampler."""

    update: Any  # (state, None, batch) → (state, metrics)
    score: Any  # (parameters, batch) → log π of the targets [A, B, T]
    value: Any  # (critic, batch) → V(s_t) [A, B, T]


def make_programs(
    config: Config,
    model: Decoder,
    transformation: optax.GradientTransformation,
    shardings: Any,
) -> Programs:
    """Returns the programs of a run.

    Args:
      config: the run's config.
      model: the decoder.
      transformation: the optimiser.
      shardings: the shardings of the training state.
    """
    every = needs_all_outputs(config)
    update = make_step(
        make_objective(config, model),
        transformation,
        has_signal=has_tokens if every else has_advantages,
        state_shardings=shardings,
    )
    score = make_scorer(model, temperature=config.temperature)
    return Programs(update, score, make_reward_scorer(RewardModel(model)))


def needs_all_outputs(config: Config) -> bool:
    """Returns whether every output has to be trained on, even one with no advantage.

    A KL term or an entropy bonus in the loss has a gradient on every output, and so
    have PPO's and DPO's losses. A KL term in the reward changes the advantages.
    """
    values, loss = config.method_values(), METHODS[config.method].loss
    return bool(
        values.get("kl_coef") or values.get("entropy_coef") or loss in ("ppo", "dpo")
    )


def make_objective(config: Config, model: Decoder) -> Objective:
    """Returns the objective of the config's method, on the run's model."""
    values, temperature = config.method_values(), config.temperature
    loss = METHODS[config.method].loss
    if loss == "sft":
        return sft_objective(
            model, temperature=temperature, aggregate=values["aggregate"]
        )
    if loss == "dpo":
        return dpo_objective(
            model,
            temperature=temperature,
            beta=values["dpo_beta"],
            length_normalized=values["length_normalized"],
        )
    options = loss_options(config)
    if loss == "ppo":
        del options["kl_coef"]  # it is in the reward
        return ppo_objective(
            model,
            RewardModel(model),
            value_clip=values["value_clip"],
            temperature=temperature,
            **options,
        )
    return grpo_objective(model, temperature=temperature, **options)


def loss_options(config: Config) -> dict[str, Any]:
    """Returns the options of `grpo_loss` that the method and the config set."""
    values = config.method_values()
    names = ("clip_low", "clip_high", "aggregate", "entropy_coef", "importance_cap")
    names += ("delta", "kl_estimator", "importance", "surrogate", "kl_coef")
    options = {name: values[name] for name in names if name in values}
    if METHODS[config.method].kl == "reward":
        options["kl_coef"] = 0.0
    if values["max_staleness"] and values["importance_cap"] is None:
        options["importance_cap"] = 2.0
    if values["aggregate"] == "constant":
        options["max_length"] = config.max_new_tokens * max(1, tool_generations(config))
    return options


class BatchLayout:
    """Packs samples into one batch on the mesh; calling it returns that batch.

    All batches of a run have one shape, or one of `optimizer.row_lengths` shapes. DPO's
    pairs stay together in a row of twice the length.

    Args:
      config: the run's config.
      mesh: the mesh of the run.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        pairs = METHODS[config.method].coefficient == "pairs"
        self.together = together = 2 if pairs else 1
        longest = max_output_tokens(tool_generations(config), config.max_new_tokens)
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
        """Returns the batch on the host.

        Args:
          samples: the samples to pack.
          of: all samples of the step, if some were left out; see `packing.pack`.
        """
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
