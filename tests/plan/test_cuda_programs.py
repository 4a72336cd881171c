"""The programs of a step lower for NVIDIA GPUs, on a machine that has none.

In float32: for bfloat16 attention is cuDNN's, which has to be there to be asked
(`test_attention.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.generation.rollout_shapes import pad_token_lists, rollout_shape
from grpo_jax.generation.sampler import make_sampler
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.training.batch import Sample
from grpo_jax.training.optimizers import make_optimizer
from grpo_jax.training.packing import pack
from grpo_jax.training.train_step import (
    TrainState,
    make_grpo_step,
    make_scorer,
)

CONFIG = ModelConfig(
    vocab_size=64, width=32, layers=5, heads=4, kv_heads=2, head_dim=8, ffn=64
)
MODEL = Decoder(CONFIG, remat="full")
PARAMS = jax.eval_shape(MODEL.init, jax.random.key(0))
SAMPLE = Sample(
    tokens=[1] * 24, mask=[0] * 8 + [1] * 16, advantages=1.0, logps=[-4.0] * 24
)
BATCH = pack([SAMPLE] * 4, length=96)


def exported(jitted: Any, *arguments, **options) -> jax.export.Exported:
    return jax.export.export(jitted, platforms=["cuda"])(*arguments, **options)


def programs():
    optimizer, _ = make_optimizer(1e-3, steps=1)
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), PARAMS)
    yield "update", exported(make_grpo_step(MODEL, optimizer), state, PARAMS, BATCH)
    yield "reference", exported(make_scorer(MODEL), PARAMS, BATCH)
    shape = rollout_shape(2, 16, 8)
    sampler = make_sampler(shape, spread=False, max_new_tokens=32, eos_id=(0,))

    def rollout(params, tokens, mask, seed):
        key = jax.random.key(seed)
        out = sampler(MODEL, params, tokens, mask, key=key)
        return out.tokens, out.logps

    prompts = pad_token_lists([[1, 2, 3]] * 2, shape.prompts, shape.width)
    yield "rollout", exported(jax.jit(rollout), PARAMS, *prompts, np.uint32(0))


@pytest.mark.parametrize("name", ["update", "reference", "rollout"])
def test_it_lowers_for_cuda(name, cuda):
    program = cuda[name]
    assert program.platforms == ("cuda",)
    text = program.mlir_module()
    assert "stablehlo.dot_general" in text and "stablehlo.while" in text
    assert "tpu_custom_call" not in text


def test_what_comes_out_is_what_the_cpu_gives(cuda):
    logps = cuda["reference"].out_avals[0]
    assert (logps.shape, logps.dtype) == (BATCH.tokens.shape, jnp.float32)
    tokens, logps = cuda["rollout"].out_avals
    assert tokens.shape == logps.shape == (16, 32)


@pytest.fixture(scope="module")
def cuda():
    return dict(programs())
