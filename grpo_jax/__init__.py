"""grpo_jax: DeepSeekMath's post-training as pure functions on arrays.

The data passes through these stages:

    data → prompts → rollouts → rewards → credit (advantages) → packing
    → log-probabilities → losses → update → checkpoint → evaluation

`algorithms/methods.py` is the paper's table of methods. `training/sft.py` and
`training/rl.py` are the loops, whose docstrings list the steps; `train.py` runs them.
The names below are imported on first use, so that the losses need only jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.algorithms.advantages import (
        decoupled_advantages as decoupled_advantages,
    )
    from grpo_jax.algorithms.advantages import gae as gae
    from grpo_jax.algorithms.advantages import group_advantages as group_advantages
    from grpo_jax.algorithms.advantages import process_advantages as process_advantages
    from grpo_jax.algorithms.gradient_coefficients import (
        gradient_coefficient as gradient_coefficient,
    )
    from grpo_jax.algorithms.policy_losses import grpo_loss as grpo_loss
    from grpo_jax.algorithms.policy_losses import ppo_loss as ppo_loss
    from grpo_jax.algorithms.policy_losses import sft_loss as sft_loss
    from grpo_jax.algorithms.policy_losses import value_loss as value_loss
    from grpo_jax.algorithms.preference_losses import dpo_loss as dpo_loss
    from grpo_jax.algorithms.reward_model_losses import reward_loss as reward_loss
    from grpo_jax.checkpoints.huggingface.weights import (
        load_pretrained as load_pretrained,
    )
    from grpo_jax.checkpoints.huggingface.weights import (
        save_pretrained as save_pretrained,
    )
    from grpo_jax.data.prompts import encode_prompt as encode_prompt
    from grpo_jax.data.tokenizer import Tokenizer as Tokenizer
    from grpo_jax.errors import GrpoError as GrpoError
    from grpo_jax.generation.continuation import continue_rollouts as continue_rollouts
    from grpo_jax.generation.sampler import Rollouts as Rollouts
    from grpo_jax.generation.sampler import generate as generate
    from grpo_jax.generation.sampler import generate_tokens as generate_tokens
    from grpo_jax.models.config import ModelConfig as ModelConfig
    from grpo_jax.models.decoder import Decoder as Decoder
    from grpo_jax.models.logprobs import token_logprobs as token_logprobs
    from grpo_jax.models.value_head import RewardModel as RewardModel
    from grpo_jax.rewards import answers as answers
    from grpo_jax.rewards.reward_functions import rule_reward as rule_reward
    from grpo_jax.training.batch import Batch as Batch
    from grpo_jax.training.batch import Sample as Sample
    from grpo_jax.training.packing import pack as pack
    from grpo_jax.training.reward_model.scoring import score_samples as score_samples
    from grpo_jax.training.train_step import TrainState as TrainState
    from grpo_jax.training.train_step import make_grpo_step as make_grpo_step

_HOMES = {
    "GrpoError": "errors",
    "grpo_loss": "algorithms.policy_losses",
    "ppo_loss": "algorithms.policy_losses",
    "sft_loss": "algorithms.policy_losses",
    "value_loss": "algorithms.policy_losses",
    "dpo_loss": "algorithms.preference_losses",
    "gradient_coefficient": "algorithms.gradient_coefficients",
    "decoupled_advantages": "algorithms.advantages",
    "gae": "algorithms.advantages",
    "group_advantages": "algorithms.advantages",
    "process_advantages": "algorithms.advantages",
    "token_logprobs": "models.logprobs",
    "Decoder": "models.decoder",
    "ModelConfig": "models.config",
    "load_pretrained": "checkpoints.huggingface.weights",
    "save_pretrained": "checkpoints.huggingface.weights",
    "Tokenizer": "data.tokenizer",
    "encode_prompt": "data.prompts",
    "rule_reward": "rewards.reward_functions",
    "RewardModel": "models.value_head",
    "reward_loss": "algorithms.reward_model_losses",
    "score_samples": "training.reward_model.scoring",
    "generate": "generation.sampler",
    "generate_tokens": "generation.sampler",
    "Rollouts": "generation.sampler",
    "continue_rollouts": "generation.continuation",
    "Sample": "training.batch",
    "Batch": "training.batch",
    "pack": "training.packing",
    "TrainState": "training.train_step",
    "make_grpo_step": "training.train_step",
}
__all__ = sorted([*_HOMES, "answers"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"grpo_jax.{_HOMES[name]}"), name)
    if name == "answers":
        return importlib.import_module("grpo_jax.rewards.answers")
    raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
