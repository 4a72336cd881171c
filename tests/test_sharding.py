"""One mesh, whatever its shape: the numbers of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.model import Decoder, ModelConfig
from grpo_jax.packing import Sample, pack
from grpo_jax.rollout import generate, generate_tokens
from grpo_jax.update import accumulate, grpo_objective, make_scorer

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
        step = jax.jit(accumulate, static_argnums=0)
        gradients, metrics = step(
            grpo_objective(MODEL, kl_coef=0.1), params, reference, batch
        )
        ref_logps = make_scorer(MODEL)(reference, batch)
        out = generate(MODEL, params, prompts, temperature=0, **OPTIONS)
    found = metrics["loss"], gradients, out.tokens, out.logps, ref_logps
    return sharding.to_hosts(found)


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
    params = MODEL.init(jax.random.key(0))
    out = generate(MODEL, params, PROMPTS, **OPTIONS)
    return jax.device_get((out.tokens, out.logps, out.lengths))


@pytest.mark.parametrize("layout", ["gathered", "tensor"])
@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 4, 1)], ids=str)
def test_decoding_in_another_layout_draws_the_same(shape, layout, drawn):
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        params = place(MODEL.init(jax.random.key(0)), mesh)
        out = generate(MODEL, params, PROMPTS, layout=layout, **OPTIONS)
    np.testing.assert_array_equal(out.tokens, drawn[0])
    np.testing.assert_allclose(out.logps, drawn[1], atol=1e-5)
    np.testing.assert_array_equal(out.lengths, drawn[2])


@pytest.mark.parametrize(
    "layout, q_proj, down_proj",
    [("gathered", (2, 16, 32), (2, 32, 32)), ("tensor", (2, 4, 32), (2, 32, 8))],
)
def test_a_layout_holds_the_weights_as_it_says(layout, q_proj, down_proj):
    """[L, out, in] on each device: whole over fsdp, or a part for each."""
    mesh = sharding.make_mesh(1, 4, 2)
    keep = sharding.in_layout(lambda model, params: params)
    with jax.set_mesh(mesh):
        params = place(MODEL.init(jax.random.key(0)), mesh)
        moved = jax.jit(keep, static_argnames=("model", "layout"))(
            MODEL, params, layout=layout
        )
    found = [
        moved["layers"][name].addressable_shards[0].data.shape
        for name in ("q_proj", "down_proj")
    ]
    assert found == [q_proj, down_proj]


def test_only_one_layout_gathers_no_weights():
    """Of the compiled sampler: which feed-forward matrices become whole."""
    names = ("model", "layout", "samples", "max_new_tokens", "eos_id")
    sampler = jax.jit(sharding.in_layout(generate_tokens), static_argnames=names)
    mesh = sharding.make_mesh(1, 8, 1)
    found = {}
    with jax.set_mesh(mesh):
        params = place(MODEL.init(jax.random.key(0)), mesh)
        tokens = sharding.to_devices(np.ones((8, 16)), sharding.batch_sharding(mesh))
        for layout in ("train", "tensor"):
            text = (
                sampler.lower(
                    MODEL,
                    params,
                    tokens.astype(int),
                    tokens,
                    layout=layout,
                    **OPTIONS,
                )
                .compile()
                .as_text()
            )
            whole = re.findall(r"= (\w+\[[\d,]+\])\S* all-gather\(", text)
            found[layout] = {"f32[64,32]", "f32[32,64]"} & set(whole)
    assert found == {"train": {"f32[64,32]", "f32[32,64]"}, "tensor": set()}


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
