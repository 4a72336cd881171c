"""What memory settings leave alone, and what they save."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.distributed import sharding
from grpo_jax.generation import kv_cache, rollout_shapes, sampler
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import REMAT, Decoder
from grpo_jax.plan import hlo_text
from grpo_jax.plan.planned_programs import bytes_per_device
from grpo_jax.training.batch import Sample
from grpo_jax.training.optimizers import make_optimizer
from grpo_jax.training.packing import pack
from grpo_jax.training.train_step import (
    TrainState,
    make_grpo_step,
    make_scorer,
)

CONFIG = ModelConfig(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn=64
)
MODEL = Decoder(CONFIG)


def make_batch(rows=1, samples=8):
    rng = np.random.default_rng(0)
    return pack(
        [
            Sample(
                tokens=rng.integers(0, 64, 12).tolist(),
                mask=[0] * 4 + [1] * 8,
                advantages=a,
                logps=[-4.0] * 12,
            )
            for a in rng.normal(size=samples).tolist()
        ],
        length=12,
        rows=rows,
    )


# Master weights


def walk(dtype, steps=300, *, master=True, learning_rate=1e-4):
    """Weights 1 and -3 after AdamW's steps along gradients of changing size."""
    optimizer, _ = make_optimizer(learning_rate, steps=steps, master=master)
    weights = jnp.array([1.0, -3.0], dtype)
    state = optimizer.init(weights)

    def step(carry, size):
        weights, state = carry
        gradients = size * jnp.array([1.0, -2.0])
        moves, state = optimizer.update(gradients, state, weights)
        return (optax.apply_updates(weights, moves), state), None

    sizes = 1 + jnp.arange(steps) % 3.0
    return jax.lax.scan(step, (weights, state), sizes)[0]


def test_updates_too_small_for_bfloat16_add_up_in_the_master_weights():
    exact, _ = walk(jnp.float32)
    assert np.abs(np.asarray(exact) - [1, -3]).min() > 0.02  # about 300 × 1e-4
    weights, state = walk(jnp.bfloat16)
    np.testing.assert_array_equal(state.weights, exact)
    np.testing.assert_array_equal(weights, exact.astype(jnp.bfloat16))
    # bfloat16 alone rounds each of them away, as 1e-4 is below half of its step at 1.
    lost, _ = walk(jnp.bfloat16, master=False)
    np.testing.assert_array_equal(lost, jnp.array([1.0, -3.0], jnp.bfloat16))


def test_moments_are_float32_beside_master_weights():
    params = jax.eval_shape(functools.partial(MODEL.init, dtype="bfloat16"), KEY)
    kept, _ = make_optimizer(1e-4, steps=1)
    alone, _ = make_optimizer(1e-4, steps=1, master=False)

    def bytes_a_weight(optimizer):
        state = jax.eval_shape(optimizer.init, params)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        return round(size / sum(x.size for x in jax.tree.leaves(params)), 1)

    assert bytes_a_weight(kept) == 12.0 and bytes_a_weight(alone) == 4.0


# What is recomputed


def test_what_is_recomputed_changes_memory_and_no_gradient():
    config = dataclasses.replace(CONFIG, layers=6, width=64, head_dim=16, ffn=192)
    rows = jnp.tile(jnp.arange(64)[None], (4, 1))

    def loss(params, remat):
        hidden = Decoder(config, remat=remat).hidden(params, rows)
        return jnp.square(hidden).mean()

    params = jax.jit(Decoder(config).init)(KEY)
    compiled: Any = {
        remat: jax.jit(jax.grad(loss), static_argnums=1).lower(params, remat).compile()
        for remat in REMAT
    }
    expected = compiled["none"](params)
    for remat, program in compiled.items():
        for a, b in zip(
            *map(jax.tree.leaves, (program(params), expected)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-6, err_msg=remat)
    temporaries = {
        remat: program.memory_analysis().temp_size_in_bytes
        for remat, program in compiled.items()
    }
    assert temporaries["full"] < 0.7 * temporaries["matmuls"]
    assert temporaries["matmuls"] < 0.8 * temporaries["none"]


def test_an_unknown_remat_is_refused():
    from grpo_jax.config import Config, ModelSettings
    from grpo_jax.errors import GrpoError
    from grpo_jax.training.config_checks import validate_config

    config = Config(sft_steps=1, model=ModelSettings(path="x", remat="fulll"))
    with pytest.raises(GrpoError, match="did you mean full"):
        validate_config(config)


# The reference


def test_a_reference_in_the_dtype_of_the_computation_says_the_same_bits():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    params = MODEL.init(KEY)
    score, batch = make_scorer(model), make_batch()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    np.testing.assert_array_equal(score(params, batch), score(half, batch))
    finer = dataclasses.replace(MODEL, dtype="float32")
    assert np.abs(make_scorer(finer)(params, batch) - score(half, batch)).max() > 1e-4


def test_host_memory_holds_the_same_numbers():
    mesh = sharding.make_mesh(2, 2, 2)
    params = MODEL.init(KEY)
    there = jax.device_put(params, sharding.shardings(params, mesh))
    away = sharding.move_to_memory(there, "host")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(away)} == {"pinned_host"}
    back = sharding.move_to_memory(away, "device")
    for a, b in zip(*map(jax.tree.leaves, (back, there)), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


# The mesh


def test_the_optimisers_state_is_spread_over_data_too():
    """A step on 4 × 2 devices moves what a single one moves, each device its share."""
    optimizer, _ = make_optimizer(1e-2, steps=4)
    batch = make_batch(rows=8)
    states = []
    for mesh in (
        sharding.make_mesh(devices=jax.devices()[:1]),
        sharding.make_mesh(4, 2, 1),
    ):
        with jax.set_mesh(mesh):
            state = TrainState.create(MODEL.init(KEY), optimizer)
            where = sharding.shardings(state, mesh)
            state = jax.device_put(state, where)
            step = make_grpo_step(MODEL, optimizer, kl_coef=0.0, state_shardings=where)
            placed = sharding.batch_placer(mesh)(batch)
            states.append(step(step(state, None, placed)[0], None, placed)[0])
    alone, spread = states
    for a, b in zip(*map(jax.tree.leaves, (alone, spread)), strict=True):
        np.testing.assert_allclose(a, np.asarray(b), atol=1e-4)
    up = spread.opt_state[1][0].mu["layers"]["up_proj"]
    assert up.sharding.shard_shape(up.shape) == (2, 64, 4)  # of [2, 64, 32]
    up = spread.params["layers"]["up_proj"]
    assert up.sharding.shard_shape(up.shape) == (2, 64, 16)


def compiled_sampler(mesh, tensor: int) -> Any:
    """The compiled rollout of 16 prompts on the mesh, and its shapes."""
    layout = sharding.regroup_devices(mesh, tensor)
    groups = sharding.rows_multiple(layout)
    shape = rollout_shapes.rollout_shape(16, 64, 2, groups=groups)
    program = sampler.make_sampler(
        shape,
        spread=mesh.size > 1,
        max_new_tokens=64,
        temperature=1.0,
        eos_id=(0,),
    )
    params = sharding.abstract_arrays(jax.eval_shape(MODEL.init, KEY), layout)
    tokens, mask = (
        jax.ShapeDtypeStruct(
            (shape.prompts, shape.width), kind, sharding=sharding.batch_sharding(layout)
        )
        for kind in (jnp.int32, jnp.bool)
    )
    jitted: Any = program.func
    with jax.set_mesh(layout):
        lowered = jitted.lower(MODEL, params, tokens, mask, key=KEY, **program.keywords)
        return lowered.compile(), bytes_per_device(params), shape


def test_caches_are_split_and_a_turn_sends_neither_weights_nor_caches():
    """16 × 2 outputs on 8 devices: rows over groups of 2, heads within a group."""
    alone, _, _ = compiled_sampler(sharding.make_mesh(devices=jax.devices()[:1]), 1)
    compiled, weights, shape = compiled_sampler(sharding.make_mesh(1, 8, 1), 2)
    mine, whole = (x.memory_analysis().temp_size_in_bytes for x in (compiled, alone))
    assert mine < whole / 4
    text = compiled.as_text()
    often = {"turns": 0, "last_turns": 0, "rounds": 1, "blocks": 1}
    before = sum(hlo_text.collective_bytes(text, 8, often).values())
    a_turn = (
        sum(hlo_text.collective_bytes(text, 8, often | {"turns": 1}).values()) - before
    )
    # Two sums of [slots, width] a layer, an embedding and the logits' exchange.
    activations = shape.slots * (32 * (2 * 2 + 1) + 64) * 4
    assert 0 < a_turn < 2 * activations < weights / 2


def test_a_cache_is_held_once():
    """A full block is put away in place, and blocks are read where they stand."""
    shape = rollout_shapes.rollout_shape(16, 16, 8, slots=64)
    program = sampler.make_sampler(shape, spread=False, max_new_tokens=512, eos_id=(0,))
    tokens, mask = (
        jax.ShapeDtypeStruct((shape.prompts, shape.width), kind)
        for kind in (jnp.int32, jnp.bool)
    )
    jitted, params = program.func, jax.eval_shape(MODEL.init, KEY)
    lowered = jitted.lower(MODEL, params, tokens, mask, key=KEY, **program.keywords)  # type: ignore
    columns = kv_cache.block_size(512) * (kv_cache.ring_blocks(512, queue=True) + 1)
    held = 2 * CONFIG.layers * 64 * columns * CONFIG.kv_heads * CONFIG.head_dim * 4
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1.5 * held


KEY = jax.random.key(0)
