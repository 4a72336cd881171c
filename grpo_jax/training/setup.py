"""Builds what a config names: model, tokenizer, training state, first weights.

The training state of a stage is built as shapes, with no array allocated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config, lora_targets, reward_names, tool_generations
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import processes, sharding
from grpo_jax.errors import GrpoError
from grpo_jax.files import file_digest
from grpo_jax.models import lora
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.optimizers import stage_optimizer
from grpo_jax.training.train_step import TrainState

_STREAMS = ("init", "sft", "rl", "eval", "reward", "critic")


def make_step_key(seed: int, stage: str, step: int) -> jax.Array:
    """Returns a step's random key, which depends on seed, stage and step only.

    Args:
      seed: the run's seed.
      stage: one of "init", "sft", "rl", "eval", "reward", "critic".
      step: the step's number.
    """
    stream = jax.random.fold_in(jax.random.key(seed), _STREAMS.index(stage))
    return jax.random.fold_in(stream, step)


def make_model(config: Config) -> tuple[Decoder, Tokenizer]:
    """Returns the decoder and the tokenizer that a config names, without weights.

    Raises:
      GrpoError: no such model folder, its sizes are not the config's, or the tokenizer
        does not fit the model.
    """
    settings = config.model
    if settings.path:
        from grpo_jax.checkpoints.huggingface import weights

        if settings.hint and not Path(settings.path).is_dir():
            raise GrpoError(
                f"config.model.path: {settings.path}: no such folder; {settings.hint}"
            )
        folder = weights.find_folder(settings.path, settings.revision or None)
        model_config = weights.model_config(folder)
        tokenizer = Tokenizer.from_folder(folder)
        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "ffn"):
            wanted, found = getattr(settings, name), getattr(model_config, name)
            if wanted and wanted != found:
                raise GrpoError(
                    f"config.model.{name}: {wanted}, but {settings.path} has {found}"
                )
    else:
        from grpo_jax.data.chain_sums import ALPHABET, TOOL_ALPHABET

        alphabet = TOOL_ALPHABET if tool_generations(config) else ALPHABET
        tokenizer = Tokenizer.from_alphabet(alphabet)
        if settings.vocab_size not in (0, tokenizer.vocab_size):
            raise GrpoError(
                f"config.model.vocab_size: {settings.vocab_size}; a new model has its "
                f"tokenizer's, {tokenizer.vocab_size}; leave it out, or set model.path"
            )
        model_config = declared_config(config, tokenizer.vocab_size)
    tokenizer.check_fits(model_config.vocab_size)
    return make_decoder(config, model_config), tokenizer


def agree_on_files(config: Config) -> None:
    """Checks that all processes read the same model and reward files.

    Data sets are compared where they are read.

    Raises:
      GrpoError: a process has other files than process 0.
    """
    if processes.process_count() == 1:
        return
    if config.model.path:
        from grpo_jax.checkpoints.huggingface.folders import agree_on_folder

        agree_on_folder(config.model.path, config.model.revision or None)
    files = [name.rpartition(":")[0] for name in reward_names(config)]
    files = [name for name in files if name.endswith(".py")]
    files.append(config.reward_model.labels)
    found = {name: file_digest(Path(name).expanduser()) for name in files}
    processes.check_equal("rewards", found)


def make_decoder(config: Config, model_config: ModelConfig) -> Decoder:
    """Returns the decoder of an architecture, with the config's dtype and adapters."""
    m, targets = config.model, lora_targets(config)
    adapters = lora.Lora(rank=m.lora_rank, alpha=m.lora_alpha, targets=targets)
    decode_tensor = config.mesh.decode_tensor
    return Decoder(model_config, m.dtype, m.remat, adapters, decode_tensor)


def declared_config(config: Config, vocab_size: int) -> ModelConfig:
    """Returns the architecture that the config's own sizes define (Llama's)."""
    m = config.model
    return ModelConfig(
        vocab_size=vocab_size,
        width=m.width,
        layers=m.layers,
        heads=m.heads,
        kv_heads=m.kv_heads or m.heads,
        head_dim=m.width // m.heads,
        ffn=m.ffn,
        tied=m.tied,
    )


def describe_state(config: Config, mesh: Mesh) -> str:
    """Returns one line on the size of the training state."""
    declared = declared_config(config, config.model.vocab_size)
    decoder = make_decoder(config, declared)
    stage = "sft" if config.method == "sft" else "rl"
    optimizer, _ = stage_optimizer(stage, config)
    state = abstract_state(config, decoder, mesh, stage, optimizer)

    leaves = jax.tree.leaves(state)
    whole = sum(x.size * x.dtype.itemsize for x in leaves)
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in leaves]
    local = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)
    return (
        f"state: {_millions(state.params) / 1e3:.2f} B parameters in "
        f"{config.model.param_dtype}, {whole / 1e9:.1f} GB with the optimiser's, "
        f"{local / 1e9:.1f} GB on each of {mesh.size} device(s)"
    )


def describe_size(model: Decoder) -> str:
    """Returns how many parameters there are, and with LoRA how many are trained."""
    init = functools.partial(lora.begin_stage, model.lora)
    key = jax.random.key(0)
    whole = jax.eval_shape(lambda key: init(model.init(key), key), key)
    trained, frozen = lora.split_adapters(whole)
    part = f", {_millions(trained):.3g} M of them trained (LoRA)," if frozen else ""
    return f"{_millions(whole):.1f} M parameters{part}"


def _millions(params: Params) -> float:
    return sum(x.size for x in jax.tree.leaves(params)) / 1e6


def abstract_params(config: Config, model: Decoder, stage: str) -> Params:
    """Returns a stage's parameters as shapes and dtypes."""

    def make(key):
        params = model.init(key, config.model.param_dtype)
        value = RewardModel(model).init(key, params)
        if stage.startswith("reward"):
            return value
        params = lora.begin_stage(model.lora, params, key)
        critic = METHODS[config.method].coefficient == "critic"
        return params | {"value": value} if stage == "rl" and critic else params

    return jax.eval_shape(make, jax.random.key(0))


def abstract_state(
    config: Config,
    model: Decoder,
    mesh: Mesh,
    stage: str,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Returns a stage's training state as shapes, dtypes and shardings.

    Nothing is allocated.
    """
    create = functools.partial(TrainState.create, optimizer=optimizer)
    state = jax.eval_shape(create, abstract_params(config, model, stage))
    return sharding.abstract_arrays(state, mesh)


def initial_params(config: Config, model: Decoder, mesh: Mesh) -> Params:
    """Returns the weights of `model.path`, or new ones from the seed, on the mesh."""
    settings = config.model
    if settings.path:
        from grpo_jax.checkpoints.huggingface import weights

        _, params = weights.load_pretrained(
            settings.path,
            dtype=settings.param_dtype,
            revision=settings.revision or None,
            mesh=mesh,
        )
        return params
    init = functools.partial(model.init, dtype=settings.param_dtype)
    return make_on_mesh(mesh, init, make_step_key(config.seed, "init", 0))


def make_on_mesh(
    mesh: Mesh, make: Callable[..., Params], *arguments: Any, **options: Any
) -> Params:
    """Returns make(*arguments), computed on the mesh as its shardings say.

    Args:
      mesh: the mesh.
      make: a function of arrays.
      *arguments: its arguments.
      **options: those of `jax.jit`.
    """
    out = sharding.shardings(jax.eval_shape(make, *arguments), mesh)
    return jax.jit(make, out_shardings=out, **options)(*arguments)
