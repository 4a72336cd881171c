"""grpo_jax: DeepSeekMath's post-training as pure functions on arrays.

The data's way, a file each:

    data → prompts → rollout → rewards → credit (advantages) → packing → logprobs
    → losses → update → checkpoint → evaluate

`methods.py` is the paper's table; `sft.py` and `rl.py` are the loops, each told in
numbered steps; `train.py` runs them.
The names below load when they are asked for: the losses need jax and nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax import answers as answers
    from grpo_jax.advantages import decoupled_advantages as decoupled_advantages
    from grpo_jax.advantages import gae as gae
    from grpo_jax.advantages import group_advantages as group_advantages
    from grpo_jax.advantages import process_advantages as process_advantages
    from grpo_jax.coefficients import gradient_coefficient as gradient_coefficient
    from grpo_jax.continuation import continue_rollouts as continue_rollouts
    from grpo_jax.errors import GrpoError as GrpoError
    from grpo_jax.logprobs import token_logprobs as token_logprobs
    from grpo_jax.losses import grpo_loss as grpo_loss
    from grpo_jax.losses import ppo_loss as ppo_loss
    from grpo_jax.losses import sft_loss as sft_loss
    from grpo_jax.losses import value_loss as value_loss
    from grpo_jax.model import Decoder as Decoder
    from grpo_jax.model import ModelConfig as ModelConfig
    from grpo_jax.packing import Batch as Batch
    from grpo_jax.packing import Sample as Sample
    from grpo_jax.packing import pack as pack
    from grpo_jax.preferences import dpo_loss as dpo_loss
    from grpo_jax.reward_model.losses import reward_loss as reward_loss
    from grpo_jax.reward_model.model import RewardModel as RewardModel
    from grpo_jax.reward_model.model import score_samples as score_samples
    from grpo_jax.rollout import Rollouts as Rollouts
    from grpo_jax.rollout import generate as generate
    from grpo_jax.rollout import generate_tokens as generate_tokens
    from grpo_jax.tokenizer import Tokenizer as Tokenizer
    from grpo_jax.update import TrainState as TrainState
    from grpo_jax.update import make_grpo_step as make_grpo_step
    from grpo_jax.weights import load_pretrained as load_pretrained
    from grpo_jax.weights import save_pretrained as save_pretrained

_HOMES = {
    "GrpoError": "errors",
    "grpo_loss": "losses",
    "ppo_loss": "losses",
    "sft_loss": "losses",
    "value_loss": "losses",
    "dpo_loss": "preferences",
    "gradient_coefficient": "coefficients",
    "decoupled_advantages": "advantages",
    "gae": "advantages",
    "group_advantages": "advantages",
    "process_advantages": "advantages",
    "token_logprobs": "logprobs",
    "Decoder": "model",
    "ModelConfig": "model",
    "load_pretrained": "weights",
    "save_pretrained": "weights",
    "Tokenizer": "tokenizer",
    "RewardModel": "reward_model.model",
    "reward_loss": "reward_model.losses",
    "score_samples": "reward_model.model",
    "generate": "rollout",
    "generate_tokens": "rollout",
    "Rollouts": "rollout",
    "continue_rollouts": "continuation",
    "Sample": "packing",
    "Batch": "packing",
    "pack": "packing",
    "TrainState": "update",
    "make_grpo_step": "update",
}
__all__ = sorted([*_HOMES, "answers"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"grpo_jax.{_HOMES[name]}"), name)
    if name == "answers":
        return importlib.import_module("grpo_jax.answers")
    raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
