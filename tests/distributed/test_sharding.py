"""One mesh, whatever its shape: the numbers of one device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.generation import reshard
from grpo_jax.generation.sampler import generate
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.training.batch import Sample
from grpo_jax.training.packing import pack
from grpo_jax.training.train_step import (
    accumulate_gradients,
    grpo_objective,
    make_scorer,
)

CONFIG = ModelConfig(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn=64
)
MODEL = Decoder(CONFIG)
LAYOUTS = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def place(tree, mesh):
    return jax.device_put(tree, sharding.shardings(tree, mesh))


def make_batch():
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            tokens=rng.integers(0, 64, 12).tolist(),
            mask=[0] * 4 + [1] * 8,
            advantages=a,
        )
        for a in rng.normal(size=16).tolist()
    ]
    return pack(samples, length=12, rows=8)


OPTIONS = dict(key=jax.random.key(0), samples=2, max_new_tokens=10, eos_id=0)


def run_on(mesh, prompts):
    """On a mesh: loss, gradients, greedy tokens, and log π_ref as a pass of its own."""
    with jax.set_mesh(mesh):
        params = place(MODEL.init(jax.random.key(0)), mesh)
        reference = place(MODEL.init(jax.random.key(1)), mesh)
        batch = sharding.batch_placer(mesh)(make_batch())
        step = jax.jit(accumulate_gradients, static_argnums=0)
        gradients, metrics = step(
            grpo_objective(MODEL, kl_coef=0.1), params, reference, batch
        )
        ref_logps = make_scorer(MODEL)(reference, batch)
        out = generate(MODEL, params, prompts, temperature=0, **OPTIONS)
    found = metrics["loss"], gradients, out.tokens, out.logps, ref_logps
    return sharding.fetch_to_hosts(found)


PROMPTS = [[1, 2, 3], [9] * 14, [5]]


@pytest.fixture(scope="module")
def alone():
    return run_on(sharding.make_mesh(devices=jax.devices()[:1]), PROMPTS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_one_devices_numbers(layout, alone):
    mesh = sharding.make_mesh(*layout)
    loss, gradients, tokens, logps, ref_logps = run_on(mesh, PROMPTS)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(tokens, alone[2])
    np.testing.assert_allclose(logps, alone[3], atol=1e-5)
    np.testing.assert_allclose(ref_logps, alone[4], atol=1e-5)


@pytest.fixture(scope="module")
def drawn():
    """What one device samples."""
    out = generate(MODEL, MODEL.init(jax.random.key(0)), PROMPTS, **SAMPLED)
    return jax.device_get((out.tokens, out.logps, out.lengths))


SAMPLED: Any = dict(key=jax.random.key(2), samples=4, max_new_tokens=10, eos_id=0)


@pytest.mark.parametrize(
    "shape, tensor", [((8, 1, 1), 0), ((1, 8, 1), 4), ((2, 2, 2), 0), ((1, 2, 4), 2)]
)
def test_groups_of_devices_draw_what_one_device_draws(shape, tensor, drawn):
    """3 prompts with 4 samples each, over 8, 2, 4 and 4 groups with their own loops."""
    mesh = sharding.make_mesh(*shape)
    model = dataclasses.replace(MODEL, decode_tensor=tensor)
    with jax.set_mesh(mesh):
        params = place(MODEL.init(jax.random.key(0)), mesh)
        out = generate(model, params, PROMPTS, **SAMPLED)
    np.testing.assert_array_equal(out.tokens, drawn[0])
    np.testing.assert_allclose(out.logps, drawn[1], atol=1e-5)
    np.testing.assert_array_equal(out.lengths, drawn[2])


def test_the_samplers_parameters_are_split_within_groups_alone():
    """[L, out, in] on each device, in the dtype of the computation."""
    mesh = sharding.make_mesh(1, 4, 2)
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    with jax.set_mesh(mesh):
        params = place(MODEL.init(jax.random.key(0)), mesh)
        layout = sharding.regroup_devices(mesh, 4)
        moved = reshard.make_resharding(model, params, layout)(params)
    assert reshard.is_resharded(model, moved, layout)
    assert not reshard.is_resharded(model, params, layout)
    for name, shape in (("q_proj", (2, 8, 32)), ("down_proj", (2, 32, 16))):
        leaf = moved["layers"][name]
        assert leaf.addressable_shards[0].data.shape == shape
        whole = params["layers"][name].astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole))


def test_groups_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(GrpoError, match="decode_tensor: 3 does not divide .* 8"):
        sharding.regroup_devices(sharding.make_mesh(1, 8, 1), 3)


def test_the_weights_are_really_split():
    mesh = sharding.make_mesh(2, 2, 2)
    params = place(MODEL.init(jax.random.key(0)), mesh)
    shards = {
        name: leaf.addressable_shards[0].data.shape
        for name, leaf in params["layers"].items()
    }
    assert shards["q_proj"] == (2, 16, 16)  # [L, out / tensor, in / fsdp]
    assert shards["down_proj"] == (2, 16, 32)  # [L, out / fsdp, in / tensor]
    assert params["embed"].addressable_shards[0].data.shape == (32, 16)
    assert shards["input_norm"] == (2, 32)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(1, 8, 1)
    assert sharding.spec_of("layers/q_proj", (2, 8, 12), mesh) == jax.P(
        None, "tensor", None
    )


def test_optimiser_state_follows_the_parameters():
    import optax

    mesh = sharding.make_mesh(1, 8, 1)
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    specs = sharding.shardings(state, mesh)
    moments = specs[0].mu["layers"]["up_proj"].spec
    assert moments == sharding.shardings(params, mesh)["layers"]["up_proj"].spec
    assert moments == jax.P(None, "tensor", "fsdp")


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 1, 1), "not the number of devices, 8"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 1, 1), "1 or more"),
    ],
)
def test_a_wrong_mesh_is_refused_with_its_numbers(sizes, message):
    with pytest.raises(GrpoError, match=message):
        sharding.make_mesh(*sizes)


def test_the_rest_of_the_devices_is_taken():
    assert dict(sharding.make_mesh(2, -1, 2).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
    assert jnp.prod(jnp.array(list(sharding.make_mesh(1, -1, 1).shape.values()))) == 8
